"""One decoding step of collinear attention from the half-width memory of coefficients."""

import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.ops._backend import register, resolve
from farspan.ops._contract import Contract, without_autocast
from farspan.ops.collinear.reference import collinear_key, collinear_query
from farspan.ops.softmax.step import Ring, attend_slots, beyond_steps


def collinear_attention_step(
    q: Tensor,
    t: Tensor,
    v: Tensor,
    ring: Ring,
    positions: Tensor,
    frequencies: Tensor,
    *,
    rotary_scale: float = 1.0,
    form: str = "slack",
    tie: str = "rotary",
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`collinear_attention` of one token per row behind coefficients, which it joins; no gradients.

        t_s ↦ key R_p(s) t_s,  p(s) = p − (n − s) mod S, n = `filled`;  o = Σ_s softmax_s(q' · key_s) v_s;  n ← n + 1

    With A, B from the query, a score is Σ_j t_j (A_j cos(p θ_j) + B_j sin(p θ_j)). The kernels turn A and B once for a
    block of slots, and rotate its coefficients by their place in the block: no table of angles is read.

    Args:
        q: `[B, 1, H, K]`.
        t, v: `[B, 1, G, K/2]` from `collinear_coefficients` and `[B, 1, G, V]`.
        ring: coefficients `[B, S, G, K/2]` and values; positions count on from one token to the next, so that padding
            stands in front. Changed in place.
        positions: `[B, 1]` of the new token.
        frequencies: `[r/2]` float32, θ.
        rotary_scale: factor on cos and sin (YaRN).
        form, tie, scale: as for `collinear_attention`.
        backend: `"auto"`, `"reference"`, `"torch"` (the same function) or `"triton"`.

    Returns:
        `[B, 1, H, V]` in v's dtype.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit, or a ring that is not contiguous.
        ConfigError: where rotary pairs are not tied.
        BackendUnavailable: a backend that was named and cannot serve.

    Cost:
        One read of the filled slots, ¾ of what `softmax_attention_step` reads; two kernels on a GPU.

    Source:
        Zhu et al. 2023, arXiv 2309.08646, equations 6 to 10.

    Example:
        >>> ring = Ring(torch.zeros(1, 8, 1, 2), torch.zeros(1, 8, 1, 4), torch.zeros(1, dtype=torch.int32))
        >>> q, t = torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 1, 2)  # no key is preferred: running means
        >>> step = lambda p, v: collinear_attention_step(q, t, v * q, ring, torch.tensor([[p]]), torch.ones(2))
        >>> [step(p, v)[0, 0, 0, 0].item() for p, v in enumerate((1.0, 3.0))]
        [1.0, 2.0]
    """
    contract = Contract("collinear_attention_step")
    contract.bind("T", 1, "a step")
    contract.tensor("q", q, "B T H K")
    contract.bind("K/2", q.shape[-1] // 2, "q's K")
    contract.tensor("t", t, "B T G K/2")
    contract.tensor("v", v, "B T G V")
    contract.mask("positions", positions, "B T")
    contract.tensor("frequencies", frequencies, "r/2")
    contract.choice("form", form, ("slack", "strict"))
    ring.check(contract, "B S G K/2")
    if tie == "head" and 2 * len(frequencies) < q.shape[-1]:
        raise ConfigError("collinear_attention_step: tie='head' ties no rotary pairs here; use tie='rotary'.")
    with torch.no_grad(), without_autocast(q):
        implementation = resolve("collinear_attention_step", backend, (q, t, v, ring.keys, ring.values))
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        out: Tensor = implementation(q, t, v, ring, positions, frequencies, rotary_scale, form, factor)
    return out


def collinear_attention_step_torch(
    q: Tensor,
    t: Tensor,
    v: Tensor,
    ring: Ring,
    positions: Tensor,
    frequencies: Tensor,
    rotary_scale: float,
    form: str,
    scale: float,
) -> Tensor:
    """The formulas as they stand; arguments as `collinear_attention_step`."""
    slots = torch.arange(ring.keys.shape[1], device=q.device)
    back = (ring.filled.unsqueeze(1) - slots) % len(slots)
    angles = (positions - back).unsqueeze(-1).float() * frequencies
    cos, sin = angles.cos() * rotary_scale, angles.sin() * rotary_scale
    now = positions.unsqueeze(-1).float() * frequencies
    query = collinear_query(q, now.cos() * rotary_scale, now.sin() * rotary_scale, form=form, scale=scale)
    seen = ring.write(t, v)
    key = collinear_key(ring.keys.to(t.dtype), cos, sin, form=form, tie="rotary")
    return attend_slots(query, key, ring.values, seen, 1.0)


register(
    "collinear_attention_step",
    reference=collinear_attention_step_torch,
    torch=collinear_attention_step_torch,
    triton="farspan.ops.collinear.step_triton:collinear_attention_step_triton",
    triton_limits=beyond_steps,
)
