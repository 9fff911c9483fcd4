"""The public function of the short convolution: checks, choice of the backend, call."""

from collections.abc import Sequence

from torch import Tensor

from farspan.ops._backend import no_double, register, resolve
from farspan.ops._contract import Contract, without_autocast
from farspan.ops.short_convolution.reference import short_convolution_reference
from farspan.ops.short_convolution.torch import short_convolution_shifted

MOST_TAPS = 8


def _limits(tensors: Sequence[Tensor]) -> str | None:
    width = tensors[1].shape[1]
    return no_double(tensors) or (
        f"the kernels sum at most {MOST_TAPS} taps, not {width}" if width > MOST_TAPS else None
    )


register(
    "short_convolution",
    reference=short_convolution_reference,
    torch=short_convolution_shifted,
    triton="farspan.ops.short_convolution.triton:short_convolution_triton",
    triton_limits=_limits,
)


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Causal depthwise convolution over the last W tokens, with its activation.

    With `x` continued into the past by the state (or zeros):

        out_t = act( bias + sum_{j=0}^{W-1} weight[:, j] · x_{t-W+1+j} )

    so that `weight[:, W-1]` multiplies the current token.

    Args:
        x: `[B, T, D]`, any floating dtype.
        weight: `[D, W]`; a `Conv1d` weight `[D, 1, W]` is `weight.squeeze(1)`.
        bias: `[D]` or None.
        activation: `"silu"` or None for none.
        initial_state: the last W inputs before `x`, oldest first, `[B, D, W]` (`[num_seqs, D, W]` when packed), with
            zeros on the left where there were fewer; None means zeros. Differentiable.
        output_final_state: whether to return the last W inputs.
        cu_seqlens: boundaries of packed documents, int32 `[num_seqs + 1]` from 0 to T, with B = 1; the convolution
            restarts at each boundary.
        backend: `"auto"`, `"reference"`, `"torch"` or `"triton"` (at most 8 taps, up to float32).

    Returns:
        `out`, `[B, T, D]` in x's dtype, and the last W inputs, `[B, D, W]` (`[num_seqs, D, W]` when packed) in x's
        dtype, or None when they were not asked for.

    Raises:
        ShapeError: shapes, dtypes, devices or boundaries that do not fit.
        ConfigError: an unknown activation or backend.
        BackendUnavailable: a backend that was named and cannot serve.

    Cost:
        Time O(T · D · W), memory for the backward pass O(T · D); the kernels keep nothing beside x and sum the taps
        again in the backward pass. The state holds W · D numbers.

    Note:
        W - 1 inputs would be enough to continue; the published MetaLA keeps W, and so does this function.

    Source:
        BICLab/MetaLA: metala/modeling_metala.py; state-spaces/mamba: mamba_ssm/modules/mamba2.py.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1)
        >>> out, state = short_convolution(x, torch.tensor([[10.0, 1.0]]), activation=None, output_final_state=True)
        >>> out.flatten().tolist(), state.flatten().tolist()
        ([1.0, 12.0, 23.0], [2.0, 3.0])
    """
    contract = Contract("short_convolution")
    contract.tensor("x", x, "B T D")
    contract.tensor("weight", weight, "D W")
    contract.tensor("bias", bias, "D")
    contract.choice("activation", activation, ("silu", None))
    contract.bind("num_seqs", contract.packed(cu_seqlens), "cu_seqlens" if cu_seqlens is not None else "x's B")
    contract.tensor("initial_state", initial_state, "num_seqs D W")
    implementation = resolve("short_convolution", backend, (x, weight, bias, initial_state))
    with without_autocast(x):
        out, state = implementation(
            x, weight, bias, activation=activation, initial_state=initial_state, cu_seqlens=cu_seqlens
        )
    return out, state if output_final_state else None
