"""Gated linear attention in PyTorch operations: chunks for whole sequences, one update for one token.

Notation: a sequence is cut into chunks of C rows and laid out as `[N, M, C, K]`, with N chunks in time order
and M = B · H independent streams. `G` is the inclusive cumulative sum of the log decay inside a chunk. Whatever needs
`exp(G_t - G_s)` splits it as `exp(G_t - r) exp(r - G_s)` about a reference r:

- between chunks r is the chunk's edge, and both exponents are <= 0;
- inside a block r is the centre of the block's range, and both exponents are at most half of it;
- where half of the range of a chunk exceeds `HALF_RANGE`, the chunk is halved, and halved again, until it fits: rows of
  a second half meet columns of the first half about the last row between them, and both exponents are <= 0.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from farspan.ops import varlen
from farspan.ops._contract import compute_dtype
from farspan.ops.gated_linear.reference import recurrent_update

CHUNK = 64
# Largest exponent of the centred factorisation: exp(60) times a key still fits float32, exp(500) float64.
HALF_RANGE = {torch.float32: 60.0, torch.float64: 500.0}
# exp of this is 0 in every dtype; keeps sums finite when a decay is exactly 0 (log decay -inf).
LOG_ZERO = -1e4


def gated_linear_attention_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The decoding step: T = 1, every batch row one sequence; arguments and results as the reference's."""
    dtype = compute_dtype(q, k, v, log_decay)
    q, k, values = (x[:, 0].to(dtype) for x in (q, k, v))
    decay = None if log_decay is None else log_decay[:, 0].to(dtype).exp()
    if decay is not None and decay.dim() == 2:
        decay = decay.unsqueeze(-1)
    if initial_state is None:
        state = k.unsqueeze(-1) * values.unsqueeze(-2)
    else:
        state = recurrent_update(initial_state.to(dtype), k, values, decay)
    out = torch.matmul(q.unsqueeze(-2), state) * scale
    return out.transpose(1, 2).to(v.dtype), state


def gated_linear_attention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The form for whole sequences, in chunks; arguments and results as the reference's."""
    dtype = compute_dtype(q, k, v, log_decay)
    batch, length, heads, width = q.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    state = q.new_zeros(sequences, heads, width, v.shape[-1], dtype=dtype)
    if initial_state is not None:
        state = state + initial_state
    if v.numel() == 0 or q.numel() == 0:
        return torch.zeros_like(v), state
    chunk = min(CHUNK, 1 << (length - 1).bit_length())
    layout = _Layout(cu_seqlens, batch, length, heads, chunk)
    decay = None
    if log_decay is not None:
        log_decay = log_decay.to(dtype).clamp(min=LOG_ZERO)
        decay = layout.chunks(log_decay if log_decay.dim() == 4 else log_decay.unsqueeze(-1))
    queries = layout.chunks(q.to(dtype) * scale)
    keys, values = layout.chunks(k.to(dtype)), layout.chunks(v.to(dtype))
    out, final = _Chunked.apply(queries, keys, values, decay, layout.states(state), layout.spans)
    return layout.tokens(out).to(v.dtype), final.reshape(state.shape)


class _Layout:
    """Moves tensors between `[B, T, H, D]` and chunks `[N, M, C, D]`, padding sequences to whole chunks with zeros.

    Zeros are harmless: a padded row has decay 1, writes nothing and is not read.

    Attributes:
        spans: for each stretch of the chunk axis that shares a state, its first chunk and the one after its last.
            Batch rows run side by side in M, so that a batch is one span; packed documents follow each other.
    """

    def __init__(self, cu_seqlens: Tensor | None, batch: int, length: int, heads: int, chunk: int) -> None:
        self.batch, self.length, self.heads, self.chunk = batch, length, heads, chunk
        self.places: Tensor | None = None
        if cu_seqlens is None:
            self.rows = -(-length // chunk) * chunk
            self.spans = [(0, self.rows // chunk)]
        else:
            self.rows = varlen.aligned_length(cu_seqlens, chunk)
            self.places = varlen.aligned_positions(cu_seqlens, chunk)
            ends = [0]
            for start, end in varlen.spans(cu_seqlens):
                ends.append(ends[-1] - (start - end) // chunk)
            self.spans = list(itertools.pairwise(ends))

    def chunks(self, x: Tensor) -> Tensor:
        """`[B, T, H, D]` to `[N, B·H, C, D]`."""
        if self.places is not None:
            x = x.new_zeros(1, self.rows, *x.shape[2:]).index_copy(1, self.places, x)
        elif self.rows != self.length:
            x = F.pad(x, (0, 0, 0, 0, 0, self.rows - self.length))
        x = x.unflatten(1, (-1, self.chunk)).permute(1, 0, 3, 2, 4)
        return x.flatten(1, 2).contiguous()

    def tokens(self, x: Tensor) -> Tensor:
        """`[N, B·H, C, D]` to `[B, T, H, D]`."""
        x = x.unflatten(1, (self.batch, self.heads)).permute(1, 0, 3, 2, 4).flatten(1, 2)
        return x[:, : self.length] if self.places is None else x.index_select(1, self.places)

    def states(self, state: Tensor) -> Tensor:
        """`[B, H, K, V]`, or one state per document, to `[spans, M, K, V]`."""
        return state.flatten(0, 1).unsqueeze(0) if self.places is None else state


class _Chunked(torch.autograd.Function):
    """The chunked recurrence and its gradient, on `[N, M, C, ·]` tensors of one dtype with the scale already in q."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        initial: Tensor,
        spans: list[tuple[int, int]],
    ) -> tuple[Tensor, Tensor]:
        decays = _Decays(log_decay, q)
        written = _times(k, decays.to_end).mT @ v
        entering, ending, final = _scan(written, decays.whole, initial, spans)
        out = _times(q, decays.from_start) @ entering
        for block in decays.blocks():
            block.rows(out).add_(block.scores(q, k) @ block.columns(v))
        ctx.save_for_backward(q, k, v, log_decay, entering, ending)
        ctx.spans = spans
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, entering, ending = ctx.saved_tensors
        d_out, d_final = gradients[0].contiguous(), gradients[1]
        decays = _Decays(log_decay, q)
        read = _times(q, decays.from_start).mT @ d_out
        d_ending, d_initial = _scan_back(read, decays.whole, d_final, ctx.spans)
        dq = _times(d_out @ entering.mT, decays.from_start)
        dk = _times(v @ d_ending.mT, decays.to_end)
        dv = _times(k, decays.to_end) @ d_ending
        for block in decays.blocks():
            block.columns(dv).add_(block.scores(q, k).mT @ block.rows(d_out))
            d_scores = block.select(block.rows(d_out) @ block.columns(v).mT)
            block.rows(dq).add_(_times(d_scores @ block.keys(k), block.query_factor))
            block.columns(dk).add_(_times(d_scores.mT @ block.queries(q), block.key_factor))
        d_decay = None
        if log_decay is not None:
            local, at_end = q * dq - k * dk, (ending * d_ending).sum(-1).unsqueeze(-2)
            if log_decay.shape[-1] == 1:
                local, at_end = local.sum(-1, keepdim=True), at_end.sum(-1, keepdim=True)
            d_decay = local.flip(-2).cumsum(-2).flip(-2) + at_end
        return dq, dk, dv, d_decay, d_initial, None


class _Block(NamedTuple):
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
        """The part of `[N, M, C, D]` that asks, as a view `[N, M, C / size, size, D]` (half as many for halves)."""
        return x.unflatten(-2, (-1, 2, self.size))[..., 1, :, :] if self.halves else x.unflatten(-2, (-1, self.size))

    def columns(self, x: Tensor) -> Tensor:
        """The part of `[N, M, C, D]` that is asked, as a view of the same shape as `rows`."""
        return x.unflatten(-2, (-1, 2, self.size))[..., 0, :, :] if self.halves else x.unflatten(-2, (-1, self.size))

    def queries(self, q: Tensor) -> Tensor:
        return _times(self.rows(q), self.query_factor)

    def keys(self, k: Tensor) -> Tensor:
        return _times(self.columns(k), self.key_factor)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return self.select(self.queries(q) @ self.keys(k).mT)

    def select(self, scores: Tensor) -> Tensor:
        """Keeps what the past may answer; entries above the diagonal can be infinite, so they are never multiplied."""
        return _times(scores if self.halves else scores.tril_(), self.weight)


class _Decays:
    """Everything the recurrence needs of the log decay `[N, M, C, K]` or `[N, M, C, 1]`; None everywhere without decay.

    Attributes:
        from_start: `exp(G_t)`, what a state entering the chunk has lost when row t reads it.
        to_end: `exp(G_C - G_t)`, what row t's contribution has lost at the end of the chunk.
        whole: `exp(G_C)` as `[N, M, K, 1]`.
    """

    def __init__(self, log_decay: Tensor | None, q: Tensor) -> None:
        self.chunk, self.dtype = q.shape[-2], q.dtype
        self.from_start = self.to_end = self.whole = self.total = None
        if log_decay is None:
            return
        self.total = log_decay.cumsum(-2)
        self.limit = HALF_RANGE[q.dtype]
        if self._half_range(self.chunk) > self.limit:
            # Differences of large sums: float64 keeps them exact.
            self.total = log_decay.cumsum(-2, dtype=torch.float64)
        last = self.total[..., -1:, :]
        self.from_start, self.to_end = self._exp(self.total), self._exp(last - self.total)
        self.whole = self._exp(last).mT

    def blocks(self) -> Iterator[_Block]:
        """The blocks that together cover the causal triangle of a chunk."""
        if self.total is None:
            yield _Block(self.chunk)
        elif self.total.shape[-1] == 1:
            yield _Block(self.chunk, weight=self._exp((self.total - self.total.mT).tril_()).unsqueeze(-3))
        else:
            size = self.chunk
            while self._half_range(size) > self.limit:
                size //= 2
                first, second = self.total.unflatten(-2, (-1, 2, size)).unbind(-3)
                between = first[..., -1:, :]
                yield _Block(size, True, self._exp(second - between), self._exp(between - first))
            rows = self.total.unflatten(-2, (-1, size))
            offset = rows - (rows[..., :1, :] + rows[..., -1:, :]) / 2
            yield _Block(size, False, self._exp(offset), self._exp(-offset))

    def _half_range(self, size: int) -> float:
        """Half of the largest fall of G inside a block of the given size."""
        assert self.total is not None
        fall = self.total[..., ::size, :] - self.total[..., size - 1 :: size, :]
        return float(fall.amax()) / 2

    def _exp(self, exponent: Tensor) -> Tensor:
        return exponent.to(self.dtype).exp()


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _scan(
    written: Tensor, whole: Tensor | None, initial: Tensor, spans: list[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the states over the chunks.

    Args:
        written: what each chunk adds, `[N, M, K, V]`.
        whole: what each chunk keeps, `[N, M, K or 1, 1]`, or None for all.
        initial: state before each span, `[spans, M, K, V]`.
        spans: first chunk and end of each span.

    Returns:
        The states entering and ending each chunk, `[N, M, K, V]` each, and the state after each span.
    """
    entering, ending, final = torch.empty_like(written), torch.empty_like(written), torch.empty_like(initial)
    for span, (start, end) in enumerate(spans):
        state = initial[span]
        for index in range(start, end):
            entering[index] = state
            state = _step(state, written[index], whole, index, ending[index])
        final[span] = state
    return entering, ending, final


def _scan_back(
    read: Tensor, whole: Tensor | None, d_final: Tensor, spans: list[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Runs the gradients of the states back over the chunks: those of the ending states, and of the initial ones."""
    d_ending, d_initial = torch.empty_like(read), torch.empty_like(d_final)
    for span, (start, end) in enumerate(spans):
        gradient = d_final[span]
        for index in reversed(range(start, end)):
            d_ending[index] = gradient
            gradient = _step(gradient, read[index], whole, index, torch.empty_like(gradient))
        d_initial[span] = gradient
    return d_ending, d_initial


def _step(state: Tensor, added: Tensor, whole: Tensor | None, index: int, out: Tensor) -> Tensor:
    if whole is None:
        return torch.add(state, added, out=out)
    return torch.addcmul(added, whole[index], state, out=out)
