"""Where the tokens of one forward pass stand: positions, padding and document boundaries, the same for every layer."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from farspan.nn.positions import rope_frequencies, rotary_table

Value = TypeVar("Value")


@dataclass
class SequenceLayout:
    """Built once per forward by the model and handed to every layer.

    Attributes:
        positions: `[B, T]` int64, position of each token in its document.
        padding_mask: `[B, T]` bool, True for real tokens; None when every token is real.
        cu_seqlens: `[num_seqs + 1]` int32 document boundaries when documents are packed in one row (B = 1); else None.
        context_length: number of positions that a length-dependent position scaling plans for; None is the largest
            position here, plus 1.
        compact: whether `pack` leaves the padding in, at one end of each row: no shape then depends on a value, as a
            compiled graph wants it.
        attentions: where to collect the attention weights of this pass, layer after layer; None does not form them.
    """

    positions: Tensor
    padding_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    context_length: int | None = None
    compact: bool = False
    attentions: list[Tensor] | None = None
    _memo: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def once(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """`compute()`, evaluated for the first layer that asks for `key` and reused by the others.

        A compiled graph finds by itself what its layers share, and one that holds a single layer serves all of them:
        no layer may then differ from the others by having come first.
        """
        if torch.compiler.is_compiling():
            return compute()
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    def planned_length(self) -> int:
        """`context_length`, or what these tokens need. Reads a value from the device: ask only where it matters."""
        return self.context_length or self.once("planned length", lambda: int(self.positions.max()) + 1)

    def rotary(
        self, rotary_dim: int, parameters: Mapping[str, Any], max_position_embeddings: int
    ) -> tuple[Tensor, Tensor]:
        """cos and sin of RoPE at the positions of these tokens, for `apply_rotary`; formed once for all layers.

        Args:
            rotary_dim: r, the number of rotated channels of a head.
            parameters: the config's `rope_parameters`.
            max_position_embeddings: the trained length, to which scaled positions stretch.

        Returns:
            Two float32 tensors `[B, T, r/2]`.
        """

        def compute() -> tuple[Tensor, Tensor]:
            return rotary_table(self.positions, *self.frequencies(rotary_dim, parameters, max_position_embeddings))

        return self.once(("rotary", rotary_dim, max_position_embeddings, tuple(sorted(parameters.items()))), compute)

    def places(self) -> Tensor:
        """How many real tokens of its document come before each token here, `[B, T]` int64."""
        rows, length = self.positions.shape
        if self.padding_mask is not None:
            return (self.padding_mask.cumsum(1) - 1).clamp(min=0)
        index = torch.arange(length, device=self.positions.device)
        if self.cu_seqlens is not None:
            index = index - self.cu_seqlens[torch.bucketize(index, self.cu_seqlens, right=True) - 1]
        return index.expand(rows, length)

    def frequencies(
        self, rotary_dim: int, parameters: Mapping[str, Any], max_position_embeddings: int
    ) -> tuple[Tensor, float]:
        """Angles per position `[r/2]` of RoPE, float32 and on the device, and the factor on cos and sin."""
        length = self.planned_length() if parameters.get("rope_type") == "dynamic" else 0
        return _frequencies(rotary_dim, parameters, max_position_embeddings, length, self.positions.device)

    def pack(self, x: Tensor, ahead: bool = False) -> Tensor:
        """`[B, T, …]` with padding → `[1, N, …]` of the real tokens, row after row; unchanged without padding.

        With `compact` the shape stays. Each row then has its padding at the end, which is exact where no output depends
        on later tokens; or, with `ahead`, zeros at the start, which is exact where zeros change no state.

        A mechanism that handles packed documents so handles padding at any place exactly: a padded token neither
        decays a state, nor writes to it, nor enters a convolution.
        """
        if self.padding_mask is None:
            return x
        if self.compact:
            order = self._order(ahead)
            packed = _rows(x, order)
            return packed.masked_fill(~_beside(self.padding_mask.gather(1, order), x), 0.0) if ahead else packed
        return x.flatten(0, 1).index_select(0, self._real()).unsqueeze(0)

    def unpack(self, x: Tensor, ahead: bool = False) -> Tensor:
        """The inverse of `pack`: `[1, N, …]` → `[B, T, …]` with zeros at padded tokens."""
        if self.padding_mask is None:
            return x
        if self.compact:
            places = self.once(("places", ahead), lambda: self._order(ahead).argsort(dim=1))
            return _rows(x, places).masked_fill(~_beside(self.padding_mask, x), 0.0)
        rows, length = self.padding_mask.shape
        flat = x.new_zeros((rows * length, *x.shape[2:])).index_copy(0, self._real(), x.squeeze(0))
        return flat.unflatten(0, (rows, length))

    def sequences(self) -> Tensor | None:
        """`cu_seqlens` of what `pack` returns: document boundaries, or one sequence per padded row, or None."""
        if self.padding_mask is None or self.compact:
            return self.cu_seqlens
        mask = self.padding_mask
        return self.once(
            "padded sequences",
            lambda: torch.nn.functional.pad(mask.sum(-1).cumsum(0), (1, 0)).to(torch.int32),
        )

    def lengths(self) -> Tensor:
        """Real tokens of each sequence: `[B]`, or `[num_seqs]` when documents are packed; int64."""
        if self.padding_mask is not None:
            return self.padding_mask.sum(-1)
        if self.cu_seqlens is not None:
            return self.cu_seqlens.diff().long()
        return self.positions.new_full(self.positions.shape[:1], self.positions.shape[1])

    def observed(self, attend: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
        """`attend(values)`; where attention weights are wanted, in the form that shows them.

        An attention is linear in its values, so that unit values give the weight of every key. The output is then
        formed from the weights, for gradients to pass through them.

        Args:
            attend: `[B, S, G, V]` → `[B, T, H, V]` for any V; linear, with the same weights at each call.
            values: `[B, S, G, V]`.

        Returns:
            `[B, T, H, V]`. The weights `[B, H, T, S]` are appended to `attentions`.

        Cost:
            As `attend`; with weights O(T·S²) per head.
        """
        if self.attentions is None:
            return attend(values)
        rows, keys, groups = values.shape[:3]
        unit = torch.eye(keys, dtype=values.dtype, device=values.device)[:, None].expand(rows, -1, groups, -1)
        weights = attend(unit).transpose(1, 2)
        self.attentions.append(weights)
        shared = values.repeat_interleave(weights.shape[1] // groups, dim=2)
        return (weights @ shared.transpose(1, 2)).transpose(1, 2)

    def _order(self, ahead: bool) -> Tensor:
        mask = self.padding_mask
        assert mask is not None
        last = mask if ahead else ~mask
        return self.once(("order", ahead), lambda: last.to(torch.int8).argsort(dim=1, stable=True))

    def _real(self) -> Tensor:
        mask = self.padding_mask
        assert mask is not None
        return self.once("real tokens", lambda: mask.flatten().nonzero().squeeze(-1))


def _rows(x: Tensor, order: Tensor) -> Tensor:
    """`[B, T, …]` with the places of each row in another order `[B, T]`."""
    return x.gather(1, _beside(order, x).expand_as(x))


def _beside(x: Tensor, like: Tensor) -> Tensor:
    """`[B, T]` → `[B, T, 1, …]` with as many dimensions as `like`."""
    return x.reshape(*x.shape, *[1] * (like.dim() - 2))


def _frequencies(
    rotary_dim: int, parameters: Mapping[str, Any], max_position_embeddings: int, length: int, device: torch.device
) -> tuple[Tensor, float]:
    """`rope_frequencies` on a device, kept from call to call: a step that is captured may not copy from the host."""
    if torch.compiler.is_compiling():
        return rope_frequencies(rotary_dim, parameters, max_position_embeddings, length, device)
    key = (rotary_dim, tuple(sorted(parameters.items())), max_position_embeddings, length, device)
    if key not in _kept:
        frequencies, scaling = rope_frequencies(rotary_dim, parameters, max_position_embeddings, length)
        if len(_kept) >= _KEPT_AT_MOST:
            _kept.clear()
        _kept[key] = frequencies.to(device), scaling
    return _kept[key]


_kept: dict[Hashable, tuple[Tensor, float]] = {}
_KEPT_AT_MOST = 64
