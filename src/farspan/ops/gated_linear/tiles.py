"""Block sizes of the kernels of gated linear attention, by table."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from farspan.ops._launch import INTERPRETED

# Warp-group matrix instructions of 16 bits fail on blocks of 32 columns.
NARROWEST = 64
# Channels or columns of a program where no such instruction is, before Hopper; values that float32 reads at a time.
NARROW = 32
# Architecture families that have them: Hopper and the Blackwell of data centres.
WARP_GROUP = (9, 10)
# Tokens of a chunk, and channels of a head that a kernel holds; those of keys beyond are further heads.
CHUNK, WIDEST = 64, 128

Tile = tuple[int, int, int, int | None]
WIDE = (NARROWEST, 8, 1, None)
SCAN = (NARROWEST, 2, 1, None)


class Tiles(NamedTuple):
    """Sizes of the kernels' blocks: columns of V at once, warps, stages, most registers of a thread."""

    state: Tile = (64, 4, 3, None)
    output: Tile = (128, 4, 1, 128)
    gradient: Tile = (64, 4, 3, None)
    prepare: Tile = (NARROWEST, 4, 1, 168)
    kept: Tile = (64, 4, 3, None)  # the walk that sums what decays keep


# Of halved chunks and heads.
HALVED = Tiles((16, 8, 1, None), (128, 8, 1, None), (NARROW, 8, 1, None), WIDE, (16, 8, 1, None))
# (architecture family, padded K up to, bytes of an operand) -> tiles. The nearest older family serves an unlisted one.
TILES = {
    (8, 64, 2): Tiles((64, 4, 2, None), (128, 8, 1, None), (NARROW, 8, 2, None), WIDE, (64, 4, 1, None)),
    (8, 128, 2): Tiles((64, 8, 1, None), (64, 8, 1, None), (64, 8, 2, None), WIDE, (64, 8, 1, None)),
    (9, 64, 2): Tiles(),
    (9, 128, 2): Tiles((64, 4, 2, None), (64, 8, 1, None), (64, 8, 1, None), WIDE, (64, 8, 3, None)),
    (9, 128, 4): Tiles((64, 4, 1, None), (64, 8, 1, None), (NARROW, 8, 1, None), WIDE, (64, 4, 1, None)),
}

# What `farspan bench ops --tune` tries.
CANDIDATES = {
    "state": tuple((64, 4, stages, None) for stages in (1, 2, 3, 4)),
    "output": ((64, 4, 1, None), (64, 8, 1, None), (128, 4, 1, None), (128, 4, 1, 128), (128, 8, 1, None)),
    "gradient": tuple((64, warps, stages, None) for warps in (4, 8) for stages in (1, 2, 3)),
    "prepare": ((64, 4, 1, None), (64, 4, 1, 128), (64, 4, 1, 168), (64, 8, 1, None), (64, 8, 1, 128)),
    "kept": tuple((64, warps, stages, None) for warps in (4, 8) for stages in (1, 2, 3)),
}


def asked_family(device: int) -> int:
    """The architecture family of a card; the interpreter counts as the newest that is known."""
    return 9 if INTERPRETED else torch.cuda.get_device_properties(device).major


# The same, remembered, for what torch.compile does not trace.
family = functools.cache(asked_family)


def halved(family: int, size: int) -> bool:
    """Whether kernels take chunks and heads of half the size, for the bytes of an operand.

    A product of float32 is three, of parts that have to be in registers where no warp-group instruction is: of whole
    chunks, up to 22 KB a thread were spilled. With one it is 3.3 KB at most, and halved kernels, which hardly spill,
    are slower.
    """
    return size > 2 and family not in WARP_GROUP


def chunk_of(like: Tensor) -> int:
    """Tokens of a chunk of a tensor, by its dtype and card."""
    return CHUNK // _parts(like)


def widest_of(like: Tensor) -> int:
    """Channels of a head of a tensor that a kernel holds, by its dtype and card."""
    return WIDEST // _parts(like)


def _parts(like: Tensor) -> int:
    size = like.element_size()  # 16 bits ask for no card
    return 2 if size > 2 and halved(asked_family(like.get_device()), size) else 1


def extreme_gradient(family: int) -> Tile:
    """The tile of the gradients of extreme chunks."""
    return (NARROWEST if family in WARP_GROUP else NARROW, *WIDE[1:])


def whole(tile: Tile, columns: int) -> Tile:
    """The tile of a program that takes rows of so many columns whole: more than its own need more warps' registers."""
    return (columns, *WIDE[1:]) if columns > tile[0] else tile


def tiles(family: int, width: int, size: int) -> Tiles:
    """The entry of the table for an architecture family, a padded K and the bytes of an operand."""
    if halved(family, size):
        return HALVED
    known = max(entry[0] for entry in TILES if entry[0] <= family)
    fitting = (entry for entry in sorted(TILES) if entry[0] == known and width <= entry[1] and size <= entry[2])
    return TILES[next(fitting)]
