"""Decoding with dilated attention: only the keys that a later query can still see are kept.

In pattern (w, r) a query sees keys of its own segment, so a key is dead once its segment has closed, and of a segment a
head keeps every r-th key: ⌈w/r⌉ slots per pattern and head, and a new segment writes over the old one. Key p has slot
(p mod w) // r. Query heads that share a key head at different offsets have their slots side by side in it. One spare
slot takes the writes of keys that no head keeps.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.ops._contract import compute_dtype, without_autocast
from farspan.ops.dilated.patterns import DilatedSettings, ceil_div, head_offsets
from farspan.ops.dilated.rotation import rotate

# Queries that are answered at once: bounds the memory of their scores.
_BLOCK = 128


def on_device(numbers: tuple[int, ...] | tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Numbers as a tensor, sent to the device once: a graph that is being captured takes no copies from the host."""
    return torch.tensor(numbers, device=device) if torch.compiler.is_compiling() else _sent(numbers, device)


@functools.lru_cache(maxsize=256)
def _sent(numbers: tuple[int, ...] | tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)


@dataclass(frozen=True)
class LivePattern:
    """Where one pattern keeps its live keys: a buffer `[B, d·c + 1, G, …]` of d offsets with c slots each.

    Attributes:
        segment: w.
        dilation: r.
        offsets: of every query head.
        kept: per key head, the distinct offsets of its query heads, filled up with −1 to the same number d.
    """

    segment: int
    dilation: int
    offsets: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...]

    def rows(self, length: int) -> int:
        """Rows of the buffer for sequences of up to `length` tokens, the spare one included."""
        return len(self.kept[0]) * ceil_div(min(length, self.segment), self.dilation) + 1

    def slots(self, buffer: Tensor) -> int:
        """c of a buffer."""
        return (buffer.shape[1] - 1) // len(self.kept[0])

    def grown(self, buffer: Tensor, length: int) -> Tensor:
        """The buffer, or a larger one, with room for sequences of `length` tokens."""
        rows = self.rows(length)
        if rows <= buffer.shape[1]:
            return buffer
        larger = buffer.new_zeros((buffer.shape[0], rows, *buffer.shape[2:]))
        if not buffer.shape[1]:
            return larger
        by_offset = (len(self.kept[0]), -1)
        larger[:, :-1].unflatten(1, by_offset)[:, :, : self.slots(buffer)] = buffer[:, :-1].unflatten(1, by_offset)
        return larger

    def write(self, buffer: Tensor, new: Tensor, positions: Tensor, live: Tensor) -> None:
        """Puts `[B, T, G, …]` at `positions` `[B, T]` into the buffer, in place, where `live` `[B, T]` holds."""
        slots, kept = self.slots(buffer), on_device(self.kept, buffer.device)
        inside = (positions % self.segment)[..., None, None]
        # [B, T, G, d]: at most one offset of a key head fits a position.
        fits = (inside % self.dilation == kept) & live[..., None, None]
        index = torch.arange(kept.shape[1], device=buffer.device) * slots + inside // self.dilation
        slot = torch.where(fits.any(-1), torch.where(fits, index, 0).sum(-1), buffer.shape[1] - 1)
        buffer.scatter_(1, slot.unsqueeze(-1).expand_as(new), new.to(buffer.dtype))

    def takes(self, positions: Tensor) -> Tensor:
        """Which query heads have these positions in the pattern: `[B, T]` → `[B, H, T]` bool."""
        offsets = on_device(self.offsets, positions.device).unsqueeze(1)
        return (positions % self.segment % self.dilation).unsqueeze(1) == offsets

    def own(self, buffer: Tensor) -> Tensor:
        """Which slots hold keys at a query head's own offset, `[H, d·c]` bool."""
        kept = on_device(self.kept, buffer.device)
        offsets = on_device(self.offsets, buffer.device).unsqueeze(1)
        mine = kept.repeat_interleave(len(self.offsets) // len(kept), dim=0) == offsets
        return mine.repeat_interleave(self.slots(buffer), dim=1)


def live_patterns(settings: DilatedSettings, heads: int, groups: int) -> list[LivePattern]:
    """The buffers that H query heads on G key heads need."""
    found, size = [], heads // groups
    for segment, dilation in settings.patterns:
        offsets = head_offsets(settings.head_offset, heads, dilation)
        kept = [sorted(set(offsets[first : first + size])) for first in range(0, heads, size)]
        most = max(len(some) for some in kept)
        filled = tuple(tuple(some + [-1] * (most - len(some))) for some in kept)
        found.append(LivePattern(segment, dilation, tuple(offsets), filled))
    return found


def write_live(
    patterns: Sequence[LivePattern],
    buffers: Sequence[tuple[Tensor, Tensor]],
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    real: Tensor,
) -> None:
    """Keeps the new keys and values that later tokens may see, in place.

    Args:
        patterns: from `live_patterns`.
        buffers: keys `[B, rows, G, K]` and values `[B, rows, G, V]` per pattern.
        k, v: `[B, T, G, K]` and `[B, T, G, V]`.
        positions: `[B, T]`, place of each real token in its sequence.
        real: `[B, T]` bool, False for padding.
    """
    newest = positions.masked_fill(~real, -1).amax(1, keepdim=True)
    for pattern, (keys, values) in zip(patterns, buffers, strict=True):
        live = real & (positions // pattern.segment == newest // pattern.segment)
        pattern.write(keys, k, positions, live)
        pattern.write(values, v, positions, live)


def dilated_attention_live(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    patterns: Sequence[LivePattern],
    buffers: Sequence[tuple[Tensor, Tensor]],
    seen: Tensor,
    real: Tensor,
    settings: DilatedSettings,
) -> Tensor:
    """Causal `dilated_attention` of new tokens behind `seen` earlier ones, from the live keys, which it updates.

    Args:
        q: `[B, T, H, K]`.
        k, v: `[B, T, G, K]` and `[B, T, G, V]`.
        patterns: from `live_patterns`.
        buffers: keys and values per pattern, with room for `seen` + T tokens; written in place.
        seen: `[B]` int64, real tokens read so far.
        real: `[B, T]` bool, False for padding, which neither sees nor is seen.
        settings: of `dilated_attention`; scale, bias and rotation are read.

    Returns:
        `[B, T, H, V]` in v's dtype; rows of padding are finite.

    Cost:
        O(T·Σ w/r) per head (d times that where d offsets share a key head), in blocks of 128 tokens; O(T·(T + Σ w/r))
        with gradients, which reach the new tokens alone.
    """
    outs = []
    block = q.shape[1] if torch.is_grad_enabled() else _BLOCK
    with without_autocast(q):
        for start in range(0, q.shape[1], block):
            queries, keys, values, kept = (x[:, start : start + block] for x in (q, k, v, real))
            outs.append(_Block(queries, keys, values, kept, seen, settings).attend(patterns, buffers))
            seen = seen + kept.sum(1)
    return torch.cat(outs, dim=1)


@dataclass
class _Block:
    """A few new tokens that meet the live keys before them."""

    q: Tensor
    k: Tensor
    v: Tensor
    real: Tensor
    seen: Tensor
    settings: DilatedSettings

    def __post_init__(self) -> None:
        self.wide = compute_dtype(self.q, self.k, self.v)
        self.positions = (self.seen.unsqueeze(1) + self.real.cumsum(1) - 1).clamp(min=0)

    def attend(self, patterns: Sequence[LivePattern], buffers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """One softmax over the slots of all patterns and the new keys, `[B, T, H, V]`."""
        newest, graph = self.seen - 1, torch.is_grad_enabled()
        alone = self.q.shape[1] == 1 and not graph
        k, v, seen = self.k.detach(), self.v.detach(), buffers
        if alone:
            # One query finds itself in its slots. Of several, a new segment would write over what the first ones see.
            write_live(patterns, buffers, k, v, self.positions, self.real)
            newest = newest + self.real[:, 0]
        elif graph:
            # What autograd saves must not change when the buffers are written to.
            seen = [(keys.clone(), values.clone()) for keys, values in buffers]
        scores = [self._slots(pattern, keys, newest) for pattern, (keys, _) in zip(patterns, seen, strict=True)]
        values = [held[:, :-1] for _, held in seen]
        if not alone:
            scores.append(self._among_themselves(patterns))
            values.append(self.v)
        every = torch.cat(scores, dim=-1)
        empty = every.isneginf().all(-1, keepdim=True)
        weights = every.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
        out = torch.zeros((), dtype=self.wide, device=self.q.device)
        for part, held in zip(weights.split([x.shape[1] for x in values], dim=-1), values, strict=True):
            grouped = part.unflatten(1, (held.shape[2], -1))
            out = out + torch.einsum("bghts,bsgv->btghv", grouped, held.to(self.wide)).flatten(2, 3)
        if not alone:
            write_live(patterns, buffers, k, v, self.positions, self.real)
        return out.to(self.v.dtype)

    def _slots(self, pattern: LivePattern, buffer: Tensor, newest: Tensor) -> Tensor:
        """Scores with the slots of one pattern, `[B, H, T, d·c]`, −∞ where nothing is seen.

        A slot counts from its own offset, so that one table of rotations serves all heads.
        """
        inside, slots = self.positions % pattern.segment, pattern.slots(buffer)
        offsets = on_device(pattern.offsets, buffer.device)
        steps = (pattern.dilation * torch.arange(slots, device=buffer.device)).repeat(len(pattern.kept[0]))
        ahead = inside.unsqueeze(-1) - offsets
        middle = pattern.dilation * (slots - 1) / 2
        scores = self._products(buffer[:, :-1], ahead - middle, (steps - middle).unsqueeze(-1))
        if self.settings.distance_bias is not None:
            scores = scores + self._bias(steps - ahead.transpose(1, 2).unsqueeze(-1))
        written = steps + offsets.unsqueeze(1) <= (newest % pattern.segment)[:, None, None]
        open_segment = self.positions // pattern.segment == (newest // pattern.segment).unsqueeze(1)
        queries = pattern.takes(self.positions) & open_segment.unsqueeze(1)
        visible = queries.unsqueeze(-1) & (written & pattern.own(buffer)).unsqueeze(2)
        return torch.where(visible, scores, float("-inf"))

    def _among_themselves(self, patterns: Sequence[LivePattern]) -> Tensor:
        """Scores with the new keys, `[B, H, T, T]`, each with the logarithm of how many patterns select it."""
        distance = self.positions.unsqueeze(1) - self.positions.unsqueeze(2)
        near = (self.positions - self.seen.unsqueeze(1)).unsqueeze(-1)
        scores = self._products(self.k, near, near)
        if self.settings.distance_bias is not None:
            scores = scores + self._bias(distance.unsqueeze(1))
        times = torch.zeros_like(scores)
        for pattern in patterns:
            segments, taken = self.positions // pattern.segment, pattern.takes(self.positions)
            together = segments.unsqueeze(1) == segments.unsqueeze(2)
            times += taken.unsqueeze(2) & taken.unsqueeze(3) & together.unsqueeze(1)
        visible = (distance <= 0) & self.real.unsqueeze(1)
        # Positions that turned queries and keys of two segments may have grown beyond all bounds.
        scores = torch.where(times > 0, scores, 0.0) + times.log()
        return torch.where(visible.unsqueeze(1), scores, float("-inf"))

    def _products(self, keys: Tensor, query_places: Tensor, key_places: Tensor) -> Tensor:
        """scale·q·k, `[B, H, T, S]`, both turned by their places where there is a rotation."""
        queries, keys = self.q.to(self.wide), keys.to(self.wide)
        tables = self.settings.rotations(query_places, key_places)
        if tables is not None:
            queries, keys = rotate(queries, tables[0]), rotate(keys, tables[1])
        grouped = queries.unflatten(2, (keys.shape[2], -1))
        return torch.einsum("btghk,bsgk->bghts", grouped, keys).flatten(1, 2) * self.settings.scale

    def _bias(self, distance: Tensor) -> Tensor:
        """The bias at distances `[B, H or 1, T, S]`."""
        bias = self.settings.distance_bias
        assert bias is not None
        centre, heads = bias.shape[1] // 2, torch.arange(bias.shape[0], device=distance.device)[:, None, None]
        return bias.to(self.wide)[heads, (centre + distance).clamp(0, 2 * centre)]
