"""MetaLA attention through the kernels of gated linear attention, with gate, augmentation and norm inside them."""

from torch import Tensor

from farspan.ops.gated_linear import triton as gated_linear
from farspan.ops.metala.reference import augment_and_normalize, decay_and_key

LARGEST_VALUE_WIDTH = 256
# The logit of padding: its decay is exactly 1 and its key exactly 0, in every dtype that holds it.
KEEP = 3e4


def metala_attention_triton(
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
    """The kernels' form of `metala_attention`; arguments as there.

    Without a key of its own and with at most 256 value channels per head, nothing of the width of k or of the decay is
    ever written. Otherwise the same formulas run around the kernels.

    Returns:
        `out` `[B, T, H, V]` in v's dtype, and the final state in float32.
    """
    if key is not None or v.shape[-1] > LARGEST_VALUE_WIDTH:
        log_decay, k = decay_and_key(gate_logits, key, decay_normalizer, padding_mask)
        out, state = gated_linear.gated_linear_attention_triton(
            q, k, v.to(k.dtype), log_decay, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens
        )
        out = augment_and_normalize(out, q, k, v, augmentation, augmentation_inside, normalize, norm_eps)
        return out.to(v.dtype), state
    if padding_mask is not None:
        gate_logits = gate_logits.masked_fill((padding_mask == 0)[..., None, None], KEEP)
    options = gated_linear.Options(
        scale=float(scale),
        decay=3,
        normalizer=float(decay_normalizer),
        augment=augmentation is not None,
        inside=augmentation_inside,
        normalize=normalize,
        eps=norm_eps,
    )
    return gated_linear.attend(q, None, v, gate_logits, augmentation, initial_state, cu_seqlens, options)
