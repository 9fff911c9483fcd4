"""MetaLA attention in PyTorch operations, around the chunked form of gated linear attention."""

from torch import Tensor

from farspan.ops.gated_linear.torch import gated_linear_attention_chunked, gated_linear_attention_recurrent
from farspan.ops.metala.reference import augment_and_normalize, decay_and_key


def metala_attention_chunked(
    q: Tensor,
    gate_logits: Tensor,
    v: Tensor,
    augmentation: Tensor | None,
    *,
    key: Tensor | None,
    scale: float,
    decay_normalizer: float,
    augmentation_inside: bool,
    normalize: bool,
    norm_eps: float,
    padding_mask: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The fast form of `metala_attention`; arguments as there.

    Returns:
        `out` `[B, T, H, V]` in v's dtype, and the final state.
    """
    log_decay, k = decay_and_key(gate_logits, key, decay_normalizer, padding_mask)
    one_token = q.shape[1] == 1 and cu_seqlens is None
    mix = gated_linear_attention_recurrent if one_token else gated_linear_attention_chunked
    out, state = mix(q, k, v.to(k.dtype), log_decay, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens)
    out = augment_and_normalize(out, q, k, v, augmentation, augmentation_inside, normalize, norm_eps)
    return out.to(v.dtype), state
