"""What the launches of decoding steps share."""

from torch import Tensor


def dense_rows(x: Tensor) -> Tensor:
    """`[B, 1, H, C]` whose heads and channels lie side by side; a slice of a joint projection already does."""
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()


def step_warps(rows: int, columns: int) -> int:
    """Warps of a program that holds a state of `rows × columns` in registers."""
    return 8 if rows * columns >= 4096 else 4
