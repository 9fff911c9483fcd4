"""A piece of Triton that decoding steps share: one vector rotated by its position."""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def rotated(p, o, m, p_cos, p_sin, R: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Channels `o` (those in `m`) of the vector at `p`, the first R of them rotated; all of them float32.

    `p_cos` and `p_sin` are R/2 numbers each. Pairs are (j, j + R/2), or (2j, 2j + 1) with `INTERLEAVED`; R = 0 rotates
    nothing.
    """
    b = tl.load(p + o, mask=m, other=0).to(tl.float32)
    if R > 0:
        if INTERLEAVED:
            first = o % 2 == 0
            partner = tl.where(first, o + 1, o - 1)
            pair = o // 2
        else:
            first = o < R // 2
            partner = tl.where(first, o + R // 2, o - R // 2)
            pair = tl.where(first, o, o - R // 2)
        turns = m & (o < R)
        b_partner = tl.load(p + partner, mask=turns, other=0).to(tl.float32)
        b_cos = tl.load(p_cos + pair, mask=turns, other=1)
        b_sin = tl.load(p_sin + pair, mask=turns, other=0)
        b = b * b_cos + tl.where(first, -b_partner, b_partner) * b_sin
    return b
