"""One decoding step of cosine attention, with state and count updated in place."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from farspan.ops._backend import no_double, register, resolve
from farspan.ops._contract import Contract, changed_in_place, without_autocast
from farspan.ops.cosine.reference import length_factor
from farspan.ops.rotary import apply_rotary


class Call(NamedTuple):
    """What an implementation knows of a call beside its streams and its state; see `cosine_step`."""

    cos: Tensor | None
    sin: Tensor | None
    interleaved: bool
    by_query: bool
    eps: float


def cosine_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    exponent: Tensor | None,
    state: Tensor,
    count: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rope_interleaved: bool = False,
    norm_position: str = "value",
    eps: float = 1e-12,
    backend: str = "auto",
) -> Tensor:
    """Causal `cosine_attention` of one token per row, which changes `state` and `count` themselves; no gradients.

        c ← c + 1;  S ← S + N(R k)ᵀ v / c^σ(p);  o = N(R q) S

    Args:
        q, k, v, exponent, norm_position, eps: as in `cosine_attention`, with T = 1.
        state: `[B, H, K, V]` float32 (float64 for float64 inputs), contiguous; updated in place.
        count: `[B]` int64, real tokens before this one; updated in place.
        cos, sin: `[B, 1, r/2]` float32 of the rotation R of this position; None leaves it out.
        rope_interleaved: whether pairs are channels (2j, 2j + 1), not (j, j + r/2).
        backend: `"auto"`, `"reference"`, `"torch"` or `"triton"`.

    Returns:
        `out`, `[B, 1, H, V]` in v's dtype.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
        BackendUnavailable: a backend that was named and cannot serve.

    Cost:
        One read and one write of the state, 2·B·H·K·V numbers; one kernel on a GPU.

    Source:
        gmongaras/Cottention_Transformer: GPT_Trainer/GPTCosAttention.py.

    Example:
        >>> import torch
        >>> state, count = torch.zeros(1, 1, 2, 1), torch.zeros(1, dtype=torch.long)
        >>> ones = torch.ones(1, 1, 1, 2)
        >>> round(cosine_step(ones, ones, ones[..., :1], None, state, count).item(), 5), count.item()
        (1.0, 1)
    """
    contract = Contract("cosine_step")
    contract.bind("T", 1, "a step")
    contract.tensor("q", q, "B T H K")
    contract.tensor("k", k, "B T H K")
    contract.tensor("v", v, "B T H V")
    contract.tensor("exponent", exponent, "H")
    contract.choice("norm_position", norm_position, ("value", "query"))
    contract.tensor("state", state, "B H K V")
    contract.mask("count", count, "B")
    contract.tensor("cos", cos, "B T half")
    contract.tensor("sin", sin, "B T half")
    changed_in_place("cosine_step", state, q, v)
    implementation = resolve("cosine_step", backend, (q, k, v, exponent, state))
    with torch.no_grad(), without_autocast(q):
        call = Call(cos, sin, rope_interleaved, norm_position == "query", eps)
        out: Tensor = implementation(q, k, v, exponent, state, count, call)
        count.add_(1)
    return out


def cosine_step_torch(
    q: Tensor, k: Tensor, v: Tensor, exponent: Tensor | None, state: Tensor, count: Tensor, call: Call
) -> Tensor:
    """The formulas as they stand; arguments as `cosine_step`."""
    if call.cos is not None and call.sin is not None:
        q, k = (apply_rotary(x, call.cos, call.sin, call.interleaved) for x in (q, k))
    queries, keys = (F.normalize(x[:, 0].to(state.dtype), dim=-1, eps=call.eps) for x in (q, k))
    if exponent is not None:
        factor = length_factor(count.unsqueeze(1) + 1, exponent, state.dtype)[:, 0].unsqueeze(-1)
        queries, keys = (queries * factor, keys) if call.by_query else (queries, keys * factor)
    state.add_(keys.unsqueeze(-1) * v[:, 0].to(state.dtype).unsqueeze(-2))
    return (queries.unsqueeze(-2) @ state).transpose(1, 2).to(v.dtype)


register(
    "cosine_step",
    reference=cosine_step_torch,
    torch=cosine_step_torch,
    triton="farspan.ops.cosine.step_triton:cosine_step_triton",
    triton_limits=no_double,
)
