"""One decoding step of the short convolution, with the state updated in place."""

import torch
from torch import Tensor

from farspan.errors import ShapeError
from farspan.ops._backend import no_double, register, resolve
from farspan.ops._contract import Contract, without_autocast
from farspan.ops.short_convolution.torch import short_convolution_shifted


def short_convolution_step(
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    backend: str = "auto",
) -> Tensor:
    """`short_convolution` of one token per row, which changes `state` itself; no gradients.

    Args:
        x: `[B, 1, D]`.
        weight, bias, activation: as in `short_convolution`.
        state: the last W inputs, oldest first, `[B, D, W]` in x's dtype, contiguous; updated in place.
        backend: `"auto"`, `"reference"`, `"torch"` or `"triton"`.

    Returns:
        `out`, `[B, 1, D]` in x's dtype.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
        BackendUnavailable: a backend that was named and cannot serve.

    Cost:
        One read and one write of the state, 2·B·D·W numbers; one kernel on a GPU.

    Source:
        BICLab/MetaLA: metala/modeling_metala.py; state-spaces/mamba: mamba_ssm/modules/mamba2.py.

    Example:
        >>> import torch
        >>> state = torch.tensor([[[0.0, 2.0]]])
        >>> out = short_convolution_step(torch.tensor([[[3.0]]]), torch.tensor([[10.0, 1.0]]), state, activation=None)
        >>> out.item(), state.flatten().tolist()
        (23.0, [2.0, 3.0])
    """
    contract = Contract("short_convolution_step")
    contract.bind("T", 1, "a step")
    contract.tensor("x", x, "B T D")
    contract.tensor("weight", weight, "D W")
    contract.tensor("bias", bias, "D")
    contract.choice("activation", activation, ("silu", None))
    contract.tensor("state", state, "B D W")
    if state.dtype != x.dtype or not state.is_contiguous():
        raise ShapeError(
            f"short_convolution_step: state is {state.dtype}, contiguous: {state.is_contiguous()}; it is changed in "
            f"place and has to be a contiguous tensor of {x.dtype}."
        )
    implementation = resolve("short_convolution_step", backend, (x, weight, bias, state))
    with torch.no_grad(), without_autocast(x):
        out: Tensor = implementation(x, weight, bias, state, activation)
    return out


def short_convolution_step_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: str | None
) -> Tensor:
    """The form in PyTorch operations; arguments as `short_convolution_step`."""
    out, shifted = short_convolution_shifted(
        x, weight, bias, activation=activation, initial_state=state, cu_seqlens=None
    )
    state.copy_(shifted)
    return out


register(
    "short_convolution_step",
    reference=short_convolution_step_torch,
    torch=short_convolution_step_torch,
    triton="farspan.ops.short_convolution.step_triton:short_convolution_step_triton",
    triton_limits=no_double,
)
