"""The launches of dilated attention's decoding step."""

import functools
from collections.abc import Sequence

import triton
from torch import Tensor

from farspan.ops._launch_step import dense_rows
from farspan.ops.dilated.live import LivePattern, on_device
from farspan.ops.dilated.patterns import DilatedSettings
from farspan.ops.dilated.step_kernels import live_kernel
from farspan.ops.softmax.step_triton import WARPS, Stretches, lanes


def dilated_attention_step_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    patterns: Sequence[LivePattern],
    buffers: Sequence[tuple[Tensor, Tensor]],
    seen: Tensor,
    settings: DilatedSettings,
    cos: Tensor | None,
    sin: Tensor | None,
) -> Tensor:
    """The kernels' form of `dilated_attention_step`; arguments as there."""
    q, k, v = (dense_rows(x) for x in (q, k, v))
    heads, width, bias = q.shape[2], v.shape[-1], settings.distance_bias
    slots = tuple((keys.shape[1], pattern.slots(keys)) for pattern, (keys, _) in zip(patterns, buffers, strict=True))
    room = Stretches(q, width, heads, max(count for _, count in slots), seen, v.dtype)
    live_kernel[room.grid](
        q,
        k,
        v,
        room.stats if cos is None else cos.contiguous(),
        room.stats if sin is None else sin.contiguous(),
        room.stats if bias is None else bias.contiguous(),
        tuple(keys for keys, _ in buffers),
        tuple(values for _, values in buffers),
        on_device(slots, q.device),
        on_device(_places(tuple(patterns)), q.device),
        seen,
        room.sums,
        room.stats,
        float(settings.scale),
        0 if bias is None else bias.shape[1] // 2,
        room.parts,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        H=heads,
        Q=heads // k.shape[2],
        K=q.shape[-1],
        V=width,
        R=0 if cos is None else 2 * cos.shape[-1],
        BIAS=bias is not None,
        SEGMENTS=tuple(pattern.segment for pattern in patterns),
        DILATIONS=tuple(pattern.dilation for pattern in patterns),
        BK=max(16, triton.next_power_of_2(q.shape[-1])),
        BV=max(16, triton.next_power_of_2(width)),
        **lanes(max(q.shape[-1], width), WARPS),
    )
    return room.merge()


@functools.lru_cache(maxsize=64)
def _places(patterns: tuple[LivePattern, ...]) -> tuple[tuple[int, ...], ...]:
    """Of each pattern and query head in turn its offset and the place of that among what its key head keeps."""
    found = []
    for pattern in patterns:
        size = len(pattern.offsets) // len(pattern.kept)
        kept = [pattern.kept[head // size].index(offset) for head, offset in enumerate(pattern.offsets)]
        found.append(tuple(x for pair in zip(pattern.offsets, kept, strict=True) for x in pair))
    return tuple(found)
