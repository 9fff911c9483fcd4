"""One decoding step of state space duality, with the state updated in place."""

from typing import NamedTuple

import torch
from torch import Tensor

from farspan.errors import ShapeError
from farspan.ops._backend import no_double, register, resolve
from farspan.ops._contract import Contract, changed_in_place, without_autocast
from farspan.ops.gated_linear.reference import per_head
from farspan.ops.rotary import apply_rotary
from farspan.ops.ssd.reference import step_size


class Call(NamedTuple):
    """What an implementation knows of a call beside its streams and its state; see `state_space_step`."""

    d: Tensor | None
    dt_bias: Tensor | None
    dt_softplus: bool
    dt_limit: tuple[float, float]
    cos: Tensor | None
    sin: Tensor | None


def state_space_step(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    state: Tensor,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`state_space_duality` of one token per row, which changes `state` itself; no gradients.

        Δ = clamp(softplus(dt + dt_bias));  S ← exp(Δ a) S + (R b)ᵀ (Δ x);  y = (R c) S + d x

    Args:
        x, dt, a, b, c, d, dt_bias, dt_softplus, dt_limit: as in `state_space_duality`, with T = 1.
        state: `[B, H, K, V]` float32 (float64 for float64 inputs), contiguous; updated in place.
        cos, sin: `[B, 1, r/2]` float32 of the rotation R of b and c at this position; None leaves it out.
        backend: `"auto"`, `"reference"`, `"torch"` or `"triton"`.

    Returns:
        `out`, `[B, 1, H, V]` in x's dtype.

    Raises:
        ShapeError: shapes, dtypes, devices or groups that do not fit.
        BackendUnavailable: a backend that was named and cannot serve.

    Cost:
        One read and one write of the state, 2·B·H·K·V numbers; one kernel on a GPU.

    Source:
        Dao and Gu, "Transformers are SSMs" (arXiv:2405.21060), section 6.

    Example:
        >>> import torch
        >>> state, ones = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        >>> out = state_space_step(3 * ones, ones[0], -ones[0, 0, 0], ones, ones, None, state, dt_softplus=False)
        >>> out.item(), state.item()
        (3.0, 3.0)
    """
    contract = Contract("state_space_step")
    contract.bind("T", 1, "a step")
    contract.tensor("x", x, "B T H V")
    contract.tensor("dt", dt, "B T H")
    contract.tensor("a", a, "H")
    contract.tensor("b", b, "B T G K")
    contract.tensor("c", c, "B T G K")
    contract.tensor("d", d, "H")
    contract.tensor("dt_bias", dt_bias, "H")
    contract.tensor("state", state, "B H K V")
    contract.tensor("cos", cos, "B T half")
    contract.tensor("sin", sin, "B T half")
    if x.shape[2] % b.shape[2]:
        raise ShapeError(f"state_space_step: G={b.shape[2]} groups of b and c do not divide the H={x.shape[2]} heads.")
    changed_in_place("state_space_step", state, x, b, c)
    implementation = resolve("state_space_step", backend, (x, dt, a, b, c, d, dt_bias, state))
    with torch.no_grad(), without_autocast(x):
        out: Tensor = implementation(x, dt, a, b, c, state, Call(d, dt_bias, dt_softplus, dt_limit, cos, sin))
    return out


def state_space_step_torch(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, call: Call) -> Tensor:
    """The formulas as they stand; arguments as `state_space_step`."""
    if call.cos is not None and call.sin is not None:
        b, c = (apply_rotary(stream, call.cos, call.sin) for stream in (b, c))
    heads = x.shape[2]
    keys, queries = (per_head(stream, heads)[:, 0].to(state.dtype) for stream in (b, c))
    step = step_size(dt.to(state.dtype), call.dt_bias, call.dt_softplus, call.dt_limit)[:, 0].unsqueeze(-1)
    values = x[:, 0].to(state.dtype)
    decay = (step * a.to(state.dtype).unsqueeze(-1)).exp()
    state.mul_(decay.unsqueeze(-1)).add_(keys.unsqueeze(-1) * (step * values).unsqueeze(-2))
    out = (queries.unsqueeze(-2) @ state).squeeze(-2)
    if call.d is not None:
        out = out + call.d.to(state.dtype).unsqueeze(-1) * values
    return out.unsqueeze(1).to(x.dtype)


register(
    "state_space_step",
    reference=state_space_step_torch,
    torch=state_space_step_torch,
    triton="farspan.ops.ssd.step_triton:state_space_step_triton",
    triton_limits=no_double,
)
