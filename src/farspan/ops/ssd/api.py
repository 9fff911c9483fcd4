"""The public function of state space duality: checks, choice of the backend, call."""

from torch import Tensor

from farspan.errors import ConfigError, ShapeError
from farspan.ops._backend import register, resolve
from farspan.ops._contract import Contract, without_autocast
from farspan.ops.gated_linear.limits import kernel_limits
from farspan.ops.ssd.reference import state_space_duality_reference
from farspan.ops.ssd.torch import state_space_duality_chunked

register(
    "state_space_duality",
    reference=state_space_duality_reference,
    torch=state_space_duality_chunked,
    triton="farspan.ops.ssd.triton:state_space_duality_triton",
    triton_limits=kernel_limits,
)


def state_space_duality(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Mamba-2's recurrence: one step size per head and token says how much is forgotten and how much is written.

    For every head, with the paper's letters in lower case and `S_0 = initial_state`:

        Δ_t = clamp(softplus(dt_t + dt_bias), dt_limit)
        S_t = exp(Δ_t a) S_{t-1} + b_t^T (Δ_t x_t)         (K × V)
        y_t = c_t S_t + d x_t

    This is `gated_linear_attention` with queries c, keys b, values Δ x and the decay Δ a per head.

    Args:
        x: `[B, T, H, V]`, any floating dtype; 16-bit inputs are accumulated in float32.
        dt: the step before its softplus, `[B, T, H]`.
        a: rate of the decay per head, `[H]`, <= 0; 0 never forgets. A positive rate grows exponentially with T and soon
            overflows; it is accepted because released checkpoints have one.
        b: what a token writes to, `[B, T, G, K]`; G divides H, and head h reads group ⌊h G / H⌋. K is the state size.
        c: what a token reads, `[B, T, G, K]`.
        d: skip per head, `[H]`, or None for none.
        dt_bias: `[H]`, added before the softplus, or None.
        dt_softplus: whether dt passes the softplus; False takes `dt + dt_bias` as the step itself.
        dt_limit: smallest and largest step.
        initial_state: `[B, H, K, V]` (`[num_seqs, H, K, V]` when packed), float32; None means zeros. Differentiable.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: boundaries of packed documents, int32 `[num_seqs + 1]` from 0 to T, with B = 1; the state restarts
            at each boundary. None means that every batch row is one sequence.
        backend: `"auto"`, `"reference"`, `"torch"` or `"triton"`.

    Returns:
        `out`, `[B, T, H, V]` in x's dtype, and the final state, `[B, H, K, V]` (`[num_seqs, H, K, V]` when packed)
        in float32 (float64 for float64 inputs), or None when it was not asked for.

    Raises:
        ShapeError: shapes, dtypes, devices, groups or boundaries that do not fit.
        ConfigError: limits of the step that are not in order, or an unknown backend.
        BackendUnavailable: a backend that was named and cannot serve.

    Cost:
        As `gated_linear_attention`: time O(T · (C + V) · K) per head. The state holds K · V numbers per head.

    Note:
        `mamba_chunk_scan_combined` keeps its state as `[B, H, V, K]`; here it is `[B, H, K, V]`, as everywhere. The
        module of Wonderful Matrices has no bias of its own for dt (its linear layer has one), no limits, and a sum over
        the wrong axis between chunks, which is not reproduced.

    Source:
        Dao and Gu, "Transformers are SSMs" (arXiv:2405.21060), section 6; state-spaces/mamba:
        mamba_ssm/modules/ssd_minimal.py; LoserCheems/WonderfulMatrices: modules/ssd.py.

    Example:
        >>> import torch
        >>> x, dt, a = torch.randn(2, 10, 4, 8), torch.randn(2, 10, 4), -torch.ones(4)
        >>> b, c = torch.randn(2, 10, 2, 16), torch.randn(2, 10, 2, 16)
        >>> out, state = state_space_duality(x, dt, a, b, c, output_final_state=True)
        >>> out.shape, state.shape
        (torch.Size([2, 10, 4, 8]), torch.Size([2, 4, 16, 8]))
    """
    contract = Contract("state_space_duality")
    contract.tensor("x", x, "B T H V")
    contract.tensor("dt", dt, "B T H")
    contract.tensor("a", a, "H")
    contract.tensor("b", b, "B T G K")
    contract.tensor("c", c, "B T G K")
    contract.tensor("d", d, "H")
    contract.tensor("dt_bias", dt_bias, "H")
    contract.bind("num_seqs", contract.packed(cu_seqlens), "cu_seqlens" if cu_seqlens is not None else "x's B")
    contract.tensor("initial_state", initial_state, "num_seqs H K V")
    heads, groups = contract.sizes["H"], contract.sizes["G"]
    if groups == 0 or heads % groups:
        raise ShapeError(
            f"state_space_duality: b and c have G={groups} groups, which do not divide the H={heads} heads of x; "
            "G must be a divisor of H."
        )
    low, high = dt_limit
    if not 0 <= low <= high:
        raise ConfigError(f"state_space_duality: dt_limit={dt_limit} must be 0 <= smallest <= largest step.")
    implementation = resolve("state_space_duality", backend, (c, b, x, dt, a, d, dt_bias, initial_state))
    with without_autocast(x):
        out, state = implementation(
            x,
            dt,
            a,
            b,
            c,
            d,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            dt_limit=(float(low), float(high)),
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
        )
    return out, state if output_final_state else None
