"""How a sequence is walked in segments of chunks, and where the exponentials of its decays come from.

Notation: a sequence is cut into chunks of C rows and laid out as `[N, M, C, K]`, with N chunks in time order
and M = B · H independent streams. `G` is the inclusive cumulative sum of the log decay inside a chunk. Whatever needs
`exp(G_t - G_s)` splits it as `exp(G_t - r) exp(r - G_s)` about a reference r:

- between chunks r is the chunk's edge, and both exponents are <= 0;
- inside a block r is the centre of the block's range, and both exponents are at most half of it;
- where half of the range of a chunk exceeds `HALF_RANGE`, the chunk is halved, and halved again, until it fits: rows of
  a second half meet columns of the first half about the last row between them, and both exponents are <= 0.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from farspan.ops import varlen

# Largest exponent of the centred factorisation: exp(60) times a key still fits float32, exp(500) float64.
HALF_RANGE = {torch.float32: 60.0, torch.float64: 500.0}
# exp of this is 0 in every dtype; keeps sums finite when a decay is exactly 0 (log decay -inf).
LOG_ZERO = -1e4
# Numbers of q and v that are worked on at once: on a CPU what the caches hold, on a GPU what keeps it busy.
SEGMENT = {False: 1 << 18, True: 1 << 27}


class Cut(NamedTuple):
    """How the sequences of one call are padded to whole chunks and laid side by side or end to end.

    Attributes:
        chunk: C.
        rows: rows of a padded batch row.
        places: where packed tokens stand in the padded row; None without packing.
        spans: first chunk and end of every sequence; batch rows are one span, since they run side by side.
    """

    chunk: int
    rows: int
    places: Tensor | None
    spans: list[tuple[int, int]]

    @classmethod
    def of(cls, q: Tensor, cu_seqlens: Tensor | None, chunk: int) -> "Cut":
        length = q.shape[1]
        chunk = min(chunk, 1 << (length - 1).bit_length())
        if cu_seqlens is None:
            rows = -(-length // chunk) * chunk
            return cls(chunk, rows, None, [(0, rows // chunk)])

        def build() -> Cut:
            varlen.check_cu_seqlens(cu_seqlens, length)
            edges = [0, *itertools.accumulate(-(-(end - start) // chunk) for start, end in varlen.spans(cu_seqlens))]
            places = varlen.aligned_positions(cu_seqlens, chunk)
            return cls(chunk, edges[-1] * chunk, places, list(itertools.pairwise(edges)))

        cut: Cut = varlen.remember(cu_seqlens, ("cut", chunk), build)
        return cut

    def streams(self, state: Tensor) -> tuple[int, ...]:
        """The shape of states `[sequences, H, K, V]` as `[spans, M, K, V]`."""
        return (len(self.spans), -1, *state.shape[2:])

    def pad(self, x: Tensor) -> Tensor:
        """Pads every sequence to whole chunks with zeros: such a row has decay 1, writes nothing and is not read."""
        if self.places is not None:
            return x.new_zeros(1, self.rows, *x.shape[2:]).index_copy(1, self.places, x)
        return x if self.rows == x.shape[1] else F.pad(x, (0, 0, 0, 0, 0, self.rows - x.shape[1]))

    def unpad(self, x: Tensor, like: Tensor) -> Tensor:
        """The rows of the tokens alone, in the shape of the tensor that was padded."""
        if x.shape == like.shape:
            return x
        x = x[:, : like.shape[1]] if self.places is None else x.index_select(1, self.places)
        return x.contiguous().view(like.shape)


class Walk:
    """The segments of one call, and how they are cut out of `[B, N·C, H, D]` tensors and put back.

    Only a segment is ever laid out as `[G, C, ·]` in the dtype of the accumulation.

    Attributes:
        chunks: N.
        parts: stretches of the chunk axis that are worked on at once.
        opening: chunks that begin a span, with the span's index. Batch rows run side by side in M, so that a batch is
            one span; packed documents follow each other. A span without chunks has neither opening nor closing.
        closing: chunks that end a span, with the span's index.
    """

    def __init__(
        self,
        cut: Cut,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        dtype: torch.dtype,
        scale: float,
    ) -> None:
        if log_decay is not None and log_decay.dim() == 3:
            log_decay = log_decay.unsqueeze(-1)
        self.q, self.k, self.v = cut.pad(q), cut.pad(k), cut.pad(v)
        self.log_decay = None if log_decay is None else cut.pad(log_decay)
        self.dtype, self.chunk, self.scale = dtype, cut.chunk, scale
        self.chunks = cut.rows // cut.chunk
        filled = [(index, start, end) for index, (start, end) in enumerate(cut.spans) if end > start]
        self.opening = {start: index for index, start, _ in filled}
        self.closing = {end - 1: index for index, _, end in filled}
        size = max(1, SEGMENT[q.is_cuda] * self.chunks // (self.q.numel() + self.v.numel()))
        self.parts = [slice(start, min(start + size, self.chunks)) for start in range(0, self.chunks, size)]

    def room(self, like: Tensor) -> Tensor:
        """Where `store` puts a result of the padded shape of a tensor."""
        return like.new_empty(like.shape[0], self.chunks * self.chunk, *like.shape[2:])

    def load(self, part: slice) -> tuple[Tensor, Tensor, Tensor, "Decays"]:
        """Scaled queries, keys, values and decays of a segment."""
        queries, keys, values = (self.view(x, part) for x in (self.q, self.k, self.v))
        log_decay = None if self.log_decay is None else self.view(self.log_decay, part)
        return queries * self.scale, keys, values, Decays(log_decay, queries)

    def view(self, x: Tensor, part: slice) -> Tensor:
        """A segment as `[G, C, D]` in the dtype of the accumulation."""
        return self._chunked(x)[part].to(self.dtype).flatten(0, 2).contiguous()

    def store(self, x: Tensor, into: Tensor, part: slice) -> None:
        """Puts a segment `[G, C, D]` back into `[B, N·C, H, D]`."""
        target = self._chunked(into)[part]
        target.copy_(x.view(target.shape))

    def scan(
        self,
        order: range,
        added: Tensor,
        whole: Tensor | None,
        before: Tensor,
        state: Tensor,
        given: Tensor,
        final: Tensor,
    ) -> Tensor:
        """Runs the states of a segment over its chunks, or their gradients back.

        Args:
            order: the chunks of the segment, rising or falling.
            added: what each chunk adds, `[G, K, V]`.
            whole: what each chunk keeps, `[G, K or 1, 1]`, or None for all.
            before: receives the state in front of each chunk, `[n, M, K, V]`.
            state: the state that the segment before left, `[M, K, V]`.
            given: the state where a span begins, `[spans, M, K, V]`.
            final: receives the state where a span ends, `[spans, M, K, V]`.

        Returns:
            The state after the last chunk of the order.
        """
        begins, ends = (self.opening, self.closing) if order.step > 0 else (self.closing, self.opening)
        sources, targets = added.view(before.shape).unbind(0), before.unbind(0)
        factors = None if whole is None else whole.unflatten(0, before.shape[:2]).unbind(0)
        places = [index - min(order[0], order[-1]) for index in order]
        if order[0] not in begins:
            targets[places[0]].copy_(state)
        for index, here, following in zip(order, places, [*places[1:], None], strict=True):
            if index in begins:
                state = targets[here].copy_(given[begins[index]])
            out = None if following is None else targets[following]
            if factors is None:
                state = torch.add(sources[here], state, out=out)
            else:
                state = torch.addcmul(sources[here], factors[here], state, out=out)
            if index in ends:
                final[ends[index]] = state
        return state

    def _chunked(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.chunk)).permute(1, 0, 3, 2, 4)


class Block(NamedTuple):
    """Rows that meet columns about one reference: blocks with themselves, or second halves with first halves.

    Attributes:
        size: rows of a block.
        halves: False when a block meets itself (causally), True when second halves meet first halves (fully).
        query_factor: `exp(G_t - r)`, or None for 1.
        key_factor: `exp(r - G_s)`, or None for 1.
        weight: `exp(G_t - G_s)` of a decay per head, or None for 1.
    """

    size: int
    halves: bool = False
    query_factor: Tensor | None = None
    key_factor: Tensor | None = None
    weight: Tensor | None = None

    def rows(self, x: Tensor) -> Tensor:
        """The part of `[G, C, D]` that asks, as a view `[G · C / size, size, D]` (half as many for halves)."""
        return self._half(x, 1) if self.halves else x.view(-1, self.size, x.shape[-1])

    def columns(self, x: Tensor) -> Tensor:
        """The part of `[G, C, D]` that is asked, as a view of the same shape as `rows`."""
        return self._half(x, 0) if self.halves else x.view(-1, self.size, x.shape[-1])

    def queries(self, q: Tensor) -> Tensor:
        return times(self.rows(q), self.query_factor)

    def keys(self, k: Tensor) -> Tensor:
        return times(self.columns(k), self.key_factor)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return self.select(torch.bmm(self.queries(q), self.keys(k).mT))

    def select(self, scores: Tensor) -> Tensor:
        """Keeps what the past may answer; entries above the diagonal can be infinite, so they are never multiplied."""
        return times(scores if self.halves else scores.tril_(), self.weight)

    def _half(self, x: Tensor, which: int) -> Tensor:
        return x.view(-1, 2, self.size, x.shape[-1])[:, which]


class Decays:
    """Everything the recurrence needs of the log decay `[G, C, K]` or `[G, C, 1]`; None everywhere without decay.

    Attributes:
        from_start: `exp(G_t)`, what a state entering the chunk has lost when row t reads it.
        to_end: `exp(G_C - G_t)`, what row t's contribution has lost at the end of the chunk.
        whole: `exp(G_C)` as `[G, K, 1]`.
        blocks: the blocks that together cover the causal triangle of a chunk.
    """

    def __init__(self, log_decay: Tensor | None, q: Tensor) -> None:
        size, self.dtype = q.shape[-2], q.dtype
        self.from_start: Tensor | None = None
        self.to_end: Tensor | None = None
        self.whole: Tensor | None = None
        self.blocks = [Block(size)]
        if log_decay is None:
            return
        log_decay = log_decay.clamp(min=LOG_ZERO)
        total = log_decay.cumsum(-2)
        limit = HALF_RANGE[self.dtype]
        moderate = _half_range(total, size) <= limit
        if not moderate:  # differences of large sums: float64 keeps them exact
            total = log_decay.cumsum(-2, dtype=torch.float64)
        last = total[:, -1:]
        self.whole = self._exp(last).mT
        if moderate and total.shape[-1] > 1:
            centre, up, down = self._centred(total, size)
            self.from_start, self.to_end = up * self._exp(centre), down * self._exp(last - centre)
            self.blocks = [Block(size, False, up, down)]
            return
        self.from_start, self.to_end = self._exp(total), self._exp(last - total)
        if total.shape[-1] == 1:
            self.blocks = [Block(size, weight=self._exp((total - total.mT).tril_()))]
            return
        self.blocks = []
        while _half_range(total, size) > limit:
            size //= 2
            first, second = total.unflatten(1, (-1, 2, size)).flatten(0, 1).unbind(1)
            between = first[:, -1:]
            self.blocks.append(Block(size, True, self._exp(second - between), self._exp(between - first)))
        _, up, down = self._centred(total, size)
        self.blocks.append(Block(size, False, up, down))

    def _centred(self, total: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """The centre r of every block's range, `exp(G - r)` and `exp(r - G)`."""
        rows = total.view(-1, size, total.shape[-1])
        centre = (rows[:, :1] + rows[:, -1:]) / 2
        up = self._exp(rows - centre)
        return centre, up, up.reciprocal()

    def _exp(self, exponent: Tensor) -> Tensor:
        return exponent.to(self.dtype).exp()


def _half_range(total: Tensor, size: int) -> float:
    """Half of the largest fall of G inside a block of the given size."""
    return float((total[:, ::size] - total[:, size - 1 :: size]).amax()) / 2


def times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor
