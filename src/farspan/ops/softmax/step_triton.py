"""The launches of softmax attention's decoding step."""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from farspan.ops._launch import INTERPRETED
from farspan.ops._launch_step import dense_rows
from farspan.ops.softmax.step import Ring
from farspan.ops.softmax.step_kernels import attend_kernel, merge_kernel

# Slots of a block; stretches at most; programs of so many warps that a multiprocessor runs side by side.
BLOCK, MOST_PARTS, SIDE_BY_SIDE, WARPS = 64, 128, 6, 4
DOTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def softmax_attention_step_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring: Ring,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    scale: float,
) -> Tensor:
    """The kernels' form of `softmax_attention_step`; arguments as there."""
    q, k, v = (dense_rows(x) for x in (q, k, v))
    split = Split(q, ring, v.dtype)
    attend_kernel[split.grid](
        q,
        k,
        v,
        split.stats if cos is None else cos.contiguous(),
        split.stats if sin is None else sin.contiguous(),
        *split.tensors,
        float(scale),
        ring.keys.shape[1],
        split.parts,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        R=0 if cos is None else 2 * cos.shape[-1],
        INTERLEAVED=interleaved,
        BK=max(16, triton.next_power_of_2(q.shape[-1])),
        **split.constants,
    )
    return split.merge()


class Stretches:
    """How slots are divided, and room for what each stretch leaves.

    Args:
        q: `[B, 1, H, K]`.
        width: V.
        programs: programs of one stretch and row.
        slots: at most.
        count: `[B]`, tokens read so far; merging counts one more.
        dtype: of the output.
        warps: of a program.
    """

    def __init__(
        self, q: Tensor, width: int, programs: int, slots: int, count: Tensor, dtype: torch.dtype, warps: int = WARPS
    ) -> None:
        self.rows, _, self.heads, _ = q.shape
        at_once = SIDE_BY_SIDE * WARPS // warps * _multiprocessors(q.get_device())
        self.parts = max(1, min(at_once // max(1, self.rows * programs), triton.cdiv(slots, 4 * BLOCK), MOST_PARTS))
        self.grid = programs, self.parts, self.rows
        self.sums = q.new_empty((self.rows, self.heads, self.parts, width), dtype=torch.float32)
        self.stats = q.new_empty((self.rows, self.heads, self.parts, 2), dtype=torch.float32)
        self.out = q.new_empty((self.rows, 1, self.heads, width), dtype=dtype)
        self.count = count

    def merge(self) -> Tensor:
        """The output of all stretches together; counts the new token."""
        width = self.sums.shape[-1]
        sizes = {"H": self.heads, "V": width, "BS": 16, "BV": triton.next_power_of_2(width)}
        merge_kernel[(self.heads, self.rows)](
            self.sums, self.stats, self.count, self.out, self.parts, **sizes, num_warps=2
        )
        return self.out


class Split(Stretches):
    """The stretches of a ring, whose query heads with the same keys share programs.

    Args:
        q: `[B, 1, H, K]`.
        ring: the slots.
        dtype: of the output.
        warps: of a program.
    """

    def __init__(self, q: Tensor, ring: Ring, dtype: torch.dtype, warps: int = WARPS) -> None:
        slots, groups, width = ring.values.shape[1:]
        super().__init__(q, width, groups, slots, ring.filled, dtype, warps)
        # What is not there is stood for by something; it is never read.
        mask = self.stats if ring.mask is None else ring.mask.view(torch.uint8)
        self.tensors = ring.keys, ring.values, mask, ring.filled, self.sums, self.stats
        self.sizes: dict[str, Any] = {"G": groups, "K": q.shape[-1], "V": width, "MASKED": ring.mask is not None}
        self.sizes["BV"] = max(16, triton.next_power_of_2(width))
        dot = tl.float32 if INTERPRETED else DOTS.get(ring.keys.dtype, tl.float32)
        self.constants: dict[str, Any] = self.sizes | {
            "Q": self.heads // groups,
            "QB": max(16, triton.next_power_of_2(self.heads // groups)),
            "BT": BLOCK if max(q.shape[-1], width) <= 128 and dot is not tl.float32 else BLOCK // 2,
            "DOT": dot,
            "PRECISION": "ieee",
            "num_warps": WARPS,
            "num_stages": 3,
        }


def lanes(width: int, warps: int) -> dict[str, int]:
    """Sizes of programs that multiply no matrices, for heads of so many channels: a slot a lane, some at a time."""
    return {"BT": max(8, 2048 // triton.next_power_of_2(width)), "STAGES": 3, "num_warps": warps}


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device >= 0 else 1
