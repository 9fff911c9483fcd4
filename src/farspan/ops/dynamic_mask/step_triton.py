"""The launches of dynamic mask attention's decoding step."""

from typing import Any

import triton
from torch import Tensor

from farspan.ops._launch_step import dense_rows
from farspan.ops.dynamic_mask.step import LiveKeys
from farspan.ops.dynamic_mask.step_kernels import live_kernel, take_in_kernel
from farspan.ops.softmax.step import Ring
from farspan.ops.softmax.step_triton import Split

# Rankings that are looked at together, and numbers of keys of a tile.
SLOTS, TILE = 2048, 8192


def dynamic_mask_step_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    ranking: Tensor,
    live: LiveKeys,
    *,
    scale: float,
    keep: int,
    cos: Tensor | None,
    sin: Tensor | None,
    norms: tuple[Tensor, Tensor] | None,
    norm_eps: float,
) -> Tensor:
    """The kernels' form of `dynamic_mask_step`; arguments as there."""
    q, k, v = (dense_rows(x) for x in (q, k, v))
    keys, values, biases, rankings, _, seen = live
    slots, groups, sharing = rankings.shape[1:]
    split = Split(q, Ring(keys, values, seen), v.dtype)
    turned = cos is not None and sin is not None
    # What is not there is stood for by something; it is never read.
    turns = [x.contiguous() if x is not None else split.stats for x in (cos, sin)]
    q_norm, k_norm = (split.stats, split.stats) if norms is None else (x.contiguous() for x in norms)
    sizes: dict[str, Any] = {
        "NORMED": norms is not None,
        "G": groups,
        "SHARED": sharing,
        "K": q.shape[-1],
        "V": v.shape[-1],
        "R": 2 * cos.shape[-1] if turned and cos is not None else 0,
        "BK": max(16, triton.next_power_of_2(q.shape[-1])),
        "BV": split.constants["BV"],
    }
    take_in_kernel[(groups, len(q))](
        k,
        v,
        bias.float().contiguous(),
        ranking.float().contiguous(),
        *turns,
        k_norm,
        *live,
        float(norm_eps),
        slots,
        keep,
        k.stride(0),
        v.stride(0),
        BR=triton.next_power_of_2(sharing),
        BS=max(16, SLOTS // triton.next_power_of_2(sharing)),
        num_warps=4,
        **sizes,
    )
    tiles = {name: split.constants[name] for name in ("QB", "DOT", "PRECISION", "num_warps")}
    tiles["BT"] = max(16, TILE * 2 // keys.itemsize // max(sizes["BK"], sizes["BV"]))
    live_kernel[(groups * sharing, split.parts, len(q))](
        q,
        *turns,
        q_norm,
        keys,
        values,
        biases,
        rankings,
        split.sums,
        split.stats,
        float(scale),
        float(norm_eps),
        slots,
        split.parts,
        q.stride(0),
        Q=q.shape[2] // (groups * sharing),
        num_stages=2,
        **tiles,
        **sizes,
    )
    return split.merge()
