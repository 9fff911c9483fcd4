"""MetaLA attention through the kernels of gated linear attention, with gate, augmentation and norm inside them."""

from typing import Any

from torch import Tensor

from farspan.ops.gated_linear import triton as gated_linear
from farspan.ops.gated_linear.tiles import widest_of
from farspan.ops.metala.reference import metala_attention_reference

# Values of a row that a program holds for its norm, by the bytes of an operand: of more, registers spill in bulk.
LARGEST_VALUE_WIDTH = {2: 256, 4: 128}
# The logit of padding: its decay is exactly 1 and its key exactly 0, in every dtype that holds it.
KEEP = 3e4


def metala_attention_triton(
    q: Tensor, gate_logits: Tensor, v: Tensor, augmentation: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The kernels' form of `metala_attention`; arguments as there.

    Without a key of its own, with at most 128 key and 256 value channels per head (in float32 128, before Hopper 64 and
    128), nothing of the width of k or of the decay is ever written. Otherwise the same formulas run around the kernels.

    Returns:
        `out` `[B, T, H, V]` in v's dtype, and the final state in float32.
    """
    size = q.element_size()
    if options["key"] is not None or q.shape[-1] > widest_of(q) or v.shape[-1] > LARGEST_VALUE_WIDTH[size]:
        recurrence = gated_linear.gated_linear_attention_triton
        return metala_attention_reference(q, gate_logits, v, augmentation, recurrence=recurrence, **options)
    padding_mask = options["padding_mask"]
    if padding_mask is not None:
        gate_logits = gate_logits.masked_fill((padding_mask == 0)[..., None, None], KEEP)
    form = gated_linear.Form(
        scale=float(options["scale"]),
        from_logits=True,
        normalizer=float(options["decay_normalizer"]),
        inside=options["augmentation_inside"],
        normalize=options["normalize"],
        eps=float(options["norm_eps"]),
    )
    state, sequences = options["initial_state"], options["cu_seqlens"]
    return gated_linear.attend(q, None, v, gate_logits, augmentation, state, sequences, form)
