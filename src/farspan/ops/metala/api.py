"""The public function of MetaLA attention: checks, choice of the backend, call."""

from torch import Tensor

from farspan.errors import ConfigError
from farspan.ops._backend import register, resolve
from farspan.ops._contract import Contract, without_autocast
from farspan.ops.gated_linear.limits import kernel_limits
from farspan.ops.metala.reference import metala_attention_reference
from farspan.ops.metala.torch import metala_attention_chunked

register(
    "metala_attention",
    reference=metala_attention_reference,
    torch=metala_attention_chunked,
    triton="farspan.ops.metala.triton:metala_attention_triton",
    triton_limits=kernel_limits,
)


def metala_attention(
    q: Tensor,
    gate_logits: Tensor,
    v: Tensor,
    augmentation: Tensor | None = None,
    *,
    key: Tensor | None = None,
    scale: float | None = None,
    decay_normalizer: float = 16.0,
    augmentation_inside: bool = True,
    normalize: bool = True,
    norm_eps: float = 1e-5,
    padding_mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Linear attention that is driven by a decay alone: the key is what the decay forgets.

    For every head, with z = gate_logits, tau = decay_normalizer, w = augmentation and S_0 = initial_state:

        a_t = logsigmoid(z_t) / tau,    k_t = 1 - exp(a_t)
        S_t = diag(exp(a_t)) S_{t-1} + k_t^T v_t
        u_t = sum_c q_tc k_tc w_c
        o_t = LayerNorm_V( scale · q_t S_t + sigmoid(u_t v_t) )

    The state is a moving average of the values: every entry stays within the largest |v| seen.

    Args:
        q: queries, `[B, T, H, K]`, any floating dtype.
        gate_logits: logits of the decay, `[B, T, H, K]`; large keeps, small forgets.
        v: values, `[B, T, H, V]`.
        augmentation: w, `[H, K]`; None leaves self-augmentation out.
        key: `[B, T, H, K]`, used instead of `1 - exp(a)`: the paper's ablation. None is MetaLA.
        scale: factor of the recurrent term alone; None means `K ** -0.5`.
        decay_normalizer: tau > 0.
        augmentation_inside: True for `sigmoid(u v)`, as in the paper's equations and the released code; False for
            `sigmoid(u) v`.
        normalize: whether to normalise each head over V (no weight, no bias).
        norm_eps: epsilon of the normalisation.
        padding_mask: `[B, T]` boolean or integer, True or 1 = token. Padding neither decays nor writes, wherever it
            stands; its own outputs have no meaning.
        initial_state: `[B, H, K, V]` (`[num_seqs, H, K, V]` when packed), float32; None means zeros. Differentiable.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: boundaries of packed documents, int32 `[num_seqs + 1]` from 0 to T, with B = 1; the state restarts
            at each boundary.
        backend: `"auto"`, `"reference"`, `"torch"` or `"triton"`.

    Returns:
        `out`, `[B, T, H, V]` in v's dtype, and the final state, `[B, H, K, V]` (`[num_seqs, H, K, V]` when packed)
        in float32 (float64 for float64 inputs), or None when it was not asked for.

    Raises:
        ShapeError: shapes, dtypes, devices or boundaries that do not fit.
        ConfigError: a decay normaliser that is not positive, or an unknown backend.
        BackendUnavailable: a backend that was named and cannot serve.

    Cost:
        As `gated_linear_attention`. The state holds K · V numbers per head.

    Note:
        The paper has no scale; the released code applies `K ** -0.5` to the recurrent term and not to the augmentation,
        and so does this function. The released code computes a and k in the activation dtype; here both are float32.
        With w = 0 the augmentation adds 0.5 everywhere, which the normalisation removes.

    Source:
        Chou et al., "MetaLA" (arXiv:2411.10741), section 4; BICLab/MetaLA: metala/modeling_metala.py.

    Example:
        >>> import torch
        >>> q, z, v = torch.randn(2, 10, 3, 4), torch.randn(2, 10, 3, 4), torch.randn(2, 10, 3, 8)
        >>> out, state = metala_attention(q, z, v, torch.zeros(3, 4), output_final_state=True)
        >>> out.shape, state.shape
        (torch.Size([2, 10, 3, 8]), torch.Size([2, 3, 4, 8]))
        >>> bool(state.abs().max() <= v.abs().max())
        True
    """
    contract = Contract("metala_attention")
    contract.tensor("q", q, "B T H K")
    contract.tensor("gate_logits", gate_logits, "B T H K")
    contract.tensor("v", v, "B T H V")
    contract.tensor("augmentation", augmentation, "H K")
    contract.tensor("key", key, "B T H K")
    contract.mask("padding_mask", padding_mask, "B T")
    contract.bind("num_seqs", contract.packed(cu_seqlens), "cu_seqlens" if cu_seqlens is not None else "q's B")
    contract.tensor("initial_state", initial_state, "num_seqs H K V")
    if not decay_normalizer > 0:
        raise ConfigError(f"metala_attention: decay_normalizer={decay_normalizer} must be positive; MetaLA uses 16.")
    implementation = resolve("metala_attention", backend, (q, gate_logits, v, augmentation, key, initial_state))
    with without_autocast(q):
        out, state = implementation(
            q,
            gate_logits,
            v,
            augmentation,
            key=key,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            decay_normalizer=decay_normalizer,
            augmentation_inside=augmentation_inside,
            normalize=normalize,
            norm_eps=norm_eps,
            padding_mask=padding_mask,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
        )
    return out, state if output_final_state else None
