"""What the kernels of dynamic mask attention cannot serve, told without importing them."""

from collections.abc import Sequence

from torch import Tensor

from farspan.ops._backend import no_double
from farspan.ops.dynamic_mask.reference import Selection

WIDEST = 128
# Entries of a score matrix so small that the definition is the fastest form.
SHORT = 128 * 128


def kernel_limits(tensors: Sequence[Tensor]) -> str | None:
    """Why the kernels cannot serve these queries, keys, values and biases; None if they can."""
    if reason := no_double(tensors):
        return reason
    widest = max(tensor.shape[-1] for tensor in tensors[:3])
    return f"the kernels hold at most {WIDEST} channels per head, not {widest}" if widest > WIDEST else None


def option_limits(q: Tensor, k: Tensor, bias: Tensor, selection: Selection) -> str | None:
    """Why the kernels cannot serve this selection; None if they can."""
    if not selection.select.startswith("topk") or not selection.causal or bias.dim() != 3:
        return "the kernels serve top-k selections with causal=True and a bias per key"
    smooth = selection.block_size is not None
    if smooth or selection.window is not None:
        if selection.select != "topk_causal" or selection.key_mask is not None:
            return "the kernels take window and block_size with select='topk_causal' and without key_mask alone"
        if smooth and selection.window is not None:
            return "the kernels take either window or block_size"
    if selection.keep >= most_seen(k.shape[1], selection) and not smooth:
        return f"keep={selection.keep} drops none of {most_seen(k.shape[1], selection)} keys"
    if selection.select == "topk_global" and not drops_most(k.shape[1], selection):
        return f"keep={selection.keep} of {k.shape[1]} keys leave most pairs, which PyTorch's fused kernels do faster"
    few = q.shape[1] == 1 or q.shape[1] * k.shape[1] <= SHORT
    return "the definition is faster for so few scores" if few else None


def most_seen(keys: int, selection: Selection) -> int:
    """How many keys the selection may choose from, at most."""
    within = selection.window if selection.causal and selection.select == "topk_causal" else None
    return keys if within is None else min(keys, within)


def drops_most(keys: int, selection: Selection) -> bool:
    """Whether so few keys stay that gathering them is faster than attention to all."""
    return keys >= 4 * selection.keep
