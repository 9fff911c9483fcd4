"""One decoding step of dilated attention from the live keys, written in place, with all counts on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from farspan.errors import ShapeError
from farspan.ops._backend import register, resolve
from farspan.ops._contract import Contract, without_autocast
from farspan.ops.dilated.live import LivePattern, dilated_attention_live
from farspan.ops.dilated.patterns import DilatedSettings
from farspan.ops.rotary import apply_rotary
from farspan.ops.softmax.step import beyond_steps

Buffers = Sequence[tuple[Tensor, Tensor]]


def dilated_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    patterns: Sequence[LivePattern],
    buffers: Buffers,
    seen: Tensor,
    settings: DilatedSettings,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`dilated_attention` of one token per row behind the live keys, which it joins; no gradients.

        o = Σ_i Σ_{s ∈ N_i(n)} e^{a_s} v_s / Σ_i Σ_{s ∈ N_i(n)} e^{a_s},  a_s = scale·R q·R_s k_s + b(s − n);  n ← n + 1

    over the patterns i that keep the token's place n = `seen`, and the keys N_i(n) that they keep of its open segment,
    its own included. No value is asked of the device.

    Args:
        q: `[B, 1, H, K]`.
        k, v: `[B, 1, G, K]` and `[B, 1, G, V]`; query head h reads key head h // (H/G).
        patterns: from `live_patterns`.
        buffers: keys, already rotated by `cos` and `sin`, and values per pattern, contiguous, with room for the token;
            changed in place.
        seen: `[B]` int64, tokens read so far; changed in place.
        settings: of `dilated_attention`; scale, bias and rotation are read.
        cos, sin: `[B, 1, r/2]` float32, of the rotation R of the first r channels; None rotates nothing.
        backend: `"auto"`, `"reference"`, `"torch"` (the same function) or `"triton"`: K, V ≤ 128, no `frequencies`.

    Returns:
        `[B, 1, H, V]` in v's dtype; 0 where no pattern keeps the place.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit, or buffers that are not contiguous.
        BackendUnavailable: a backend that was named and cannot serve.

    Cost:
        One read of the keys that are seen, Σ w/r² per head at most; two kernels on a GPU.

    Source:
        Ding et al. 2023, arXiv 2307.02486, section 2.2.

    Example:
        >>> import torch
        >>> from farspan.ops.dilated.live import live_patterns
        >>> settings = DilatedSettings(((2, 1), (4, 2)))
        >>> patterns = live_patterns(settings, 1, 1)
        >>> buffers = [(torch.zeros(1, x.rows(4), 1, 2), torch.zeros(1, x.rows(4), 1, 1)) for x in patterns]
        >>> state = {"patterns": patterns, "buffers": buffers, "seen": torch.zeros(1, dtype=torch.int64)}
        >>> q, values = torch.zeros(1, 1, 1, 2), [torch.full((1, 1, 1, 1), x) for x in (1.0, 2.0, 3.0, 4.0)]
        >>> outs = [dilated_attention_step(q, q, v, settings=settings, **state) for v in values]
        >>> [round(out.item(), 4) for out in outs]
        [1.0, 1.5, 2.3333, 3.5]
    """
    contract = Contract("dilated_attention_step")
    contract.bind("T", 1, "a step")
    contract.tensor("q", q, "B T H K")
    contract.tensor("k", k, "B T G K")
    contract.tensor("v", v, "B T G V")
    contract.tensor("cos", cos, "B T r/2")
    contract.tensor("sin", sin, "B T r/2")
    contract.mask("seen", seen, "B")
    if seen.dtype != torch.int64 or contract.sizes["H"] % max(contract.sizes["G"], 1):
        raise ShapeError(
            f"dilated_attention_step: seen is {seen.dtype}, H={contract.sizes['H']}, G={contract.sizes['G']}; expected "
            "int64, and query heads that share the key heads evenly."
        )
    for i, (keys, values) in enumerate(buffers):
        contract.tensor(f"the keys of buffers[{i}]", keys, f"B rows{i} G K")
        contract.tensor(f"the values of buffers[{i}]", values, f"B rows{i} G V")
        if not (keys.is_contiguous() and values.is_contiguous()):
            raise ShapeError("dilated_attention_step: buffers are changed in place and have to be contiguous.")
    beyond = None if settings.frequencies is None else "the kernels turn no pairs of channels"
    with torch.no_grad(), without_autocast(q):
        tensors = (q, k, v, *(x for pair in buffers for x in pair))
        implementation = resolve("dilated_attention_step", backend, tensors, beyond_kernels=beyond)
        out: Tensor = implementation(q, k, v, patterns, buffers, seen, settings, cos, sin)
    return out


def narrow(tensors: Sequence[Tensor]) -> str | None:
    """Why the kernels cannot serve these tensors; None if they can."""
    if any(x.shape[-1] > 128 for x in tensors):
        return "the kernels take heads of at most 128 channels: Triton 3.6 fails to compile them for wider ones"
    return beyond_steps(tensors)


def dilated_attention_step_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    patterns: Sequence[LivePattern],
    buffers: Buffers,
    seen: Tensor,
    settings: DilatedSettings,
    cos: Tensor | None,
    sin: Tensor | None,
) -> Tensor:
    """The formulas as they stand; arguments as `dilated_attention_step`."""
    if cos is not None and sin is not None:
        q, k = (apply_rotary(x, cos, sin) for x in (q, k))
    real = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    out = dilated_attention_live(q, k, v, patterns=patterns, buffers=buffers, seen=seen, real=real, settings=settings)
    seen.add_(1)
    return out


register(
    "dilated_attention_step",
    reference=dilated_attention_step_torch,
    torch=dilated_attention_step_torch,
    triton="farspan.ops.dilated.step_triton:dilated_attention_step_triton",
    triton_limits=narrow,
)
