"""State space duality around the step-by-step recurrence, and what all its forms share."""

import functools
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from farspan.ops._contract import compute_dtype
from farspan.ops.gated_linear.reference import gated_linear_attention_reference, per_head

Recurrence = Callable[..., tuple[Tensor, Tensor]]


def through(
    recurrence: Recurrence,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    *,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """State space duality by a form of gated linear attention; arguments as `state_space_duality`.

    The queries are c, the keys b, the values dt x, and the log decay dt a.

    Args:
        recurrence: an implementation of `gated_linear_attention`.

    Returns:
        `out` `[B, T, H, V]` in x's dtype, and the final state.
    """
    dtype = compute_dtype(x, dt, a, b, c)
    step = step_size(dt.to(dtype), dt_bias, dt_softplus, dt_limit)
    values = x.to(dtype)
    out, state = recurrence(
        per_head(c, x.shape[2]),
        per_head(b, x.shape[2]),
        step.unsqueeze(-1) * values,
        step * a.to(dtype),
        scale=1.0,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )
    if d is not None:
        out = out + d.to(dtype).unsqueeze(-1) * values
    return out.to(x.dtype), state


def step_size(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float]) -> Tensor:
    """`clamp(softplus(dt + dt_bias))`.

    Args:
        dt: `[B, T, H]` in float32 or float64.
        dt_bias: `[H]` or None.
        dt_softplus: whether to apply the softplus.
        dt_limit: smallest and largest step.

    Returns:
        `[B, T, H]` in dt's dtype.
    """
    step = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        step = F.softplus(step)
    return step if dt_limit == (0.0, float("inf")) else step.clamp(*dt_limit)


state_space_duality_reference = functools.partial(through, gated_linear_attention_reference)
