"""`FarspanCache`: the layers' memories behind the cache interface of transformers (5.17 to 5.23)."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from farspan.errors import ConfigError
from farspan.mixers.cache import LayerCache


def check_context_length(length: int | None) -> None:
    """Refuses a context without a token.

    Raises:
        ConfigError: for numbers below 1.
    """
    if length is not None and length < 1:
        raise ConfigError(
            f"context_length={length} is not accepted; give the number of tokens that scaled positions plan for, "
            "from 1, or None for the length of the first forward pass."
        )


class FarspanCache(Cache):
    """One `LayerCache` per layer, the number of tokens seen, and each row's next position.

    Built by the model (`model.new_cache()`) and by `generate`; pass it back as `past_key_values` to continue. Left
    padding, beam search, prefill in chunks and continuation are exact. Positions count real tokens only.

    Args:
        layers: the memories, first layer first.
        context_length: the length that scaled positions plan for, fixed for the life of this cache; None takes the
            length of the first forward pass.
        mixers: names of the mixers that the memories are of, so that another model can refuse them; empty is unknown.
    """

    def __init__(
        self, layers: Iterable[LayerCache], context_length: int | None = None, mixers: Sequence[str] = ()
    ) -> None:
        check_context_length(context_length)
        super().__init__(layers=list(layers))
        self.mixers = list(mixers)
        self.used_up = False
        self.interrupted = False
        self.context_length = context_length
        self.tokens_seen = 0
        self.next_positions: Tensor | None = None

    def begin(self) -> None:
        """Says that layers are about to write: until `advance`, some may have read tokens that others have not."""
        self.interrupted = True

    def advance(self, length: int, next_positions: Tensor | None) -> None:
        """Records that `length` tokens per row were read; `next_positions` is `[B]`."""
        self.tokens_seen += length
        self.next_positions = next_positions
        self.interrupted = False

    def taken(self) -> "FarspanCache":
        """A cache with the memories of this one, which is used up: what changes them in place keeps no books here."""
        other = FarspanCache(self.layers, self.context_length, self.mixers)
        other.advance(self.tokens_seen, self.next_positions)
        self.layers.clear()
        self.used_up = True
        return other

    def leave_inference_mode(self) -> None:
        """Lets a cache that was filled under `torch.inference_mode` be continued outside of it."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or self.next_positions is None:
            return
        if self.next_positions.is_inference():
            self.next_positions = self.next_positions.clone()
            for layer in self.layers:
                layer.leave_inference_mode()

    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.nbytes() for layer in self.layers)

    # What follows is the interface of transformers.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens_seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.tokens_seen + int(query_length), 0

    @property
    def batch_size(self) -> int:
        return -1 if self.next_positions is None else len(self.next_positions)

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.tokens_seen > 0

    @property
    def is_croppable(self) -> bool:
        return all(layer.croppable for layer in self.layers)

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.layers)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        for layer in self.layers:
            layer.select(indices)
        if self.next_positions is not None:
            self.next_positions = self.next_positions[indices.to(self.next_positions.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        for layer in self.layers:
            layer.repeat_interleave(repeats)
        if self.next_positions is not None:
            self.next_positions = self.next_positions.repeat_interleave(repeats)

    def reset(self) -> None:
        for layer in self.layers:
            layer.reset()
        self.tokens_seen, self.next_positions, self.interrupted = 0, None, False

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the newest |tokens_to_remove| tokens (transformers passes a negative number).

        Raises:
            ConfigError: where a layer keeps a state or has evicted keys.
        """
        removed = abs(int(tokens_to_remove))
        if removed > self.tokens_seen:
            raise ConfigError(f"Cannot take back {removed} tokens from a cache that has seen {self.tokens_seen}.")
        for layer in self.layers:
            if not layer.croppable:
                layer.crop(removed)  # refuses, before any other layer was shortened
        for layer in self.layers:
            layer.crop(removed)
        self.tokens_seen -= removed
        if self.next_positions is not None:
            self.next_positions = self.next_positions - removed


def positions_of(
    attention_mask: Tensor | None, shape: tuple[int, int], cache: FarspanCache | None, device: torch.device
) -> Tensor:
    """Default positions `[B, T]` of new tokens: each row counts its real tokens, continuing where the cache stands."""
    rows, length = shape
    if attention_mask is None:
        steps = torch.arange(length, device=device).expand(rows, -1)
    else:
        steps = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    if cache is not None and cache.next_positions is not None:
        steps = steps + cache.next_positions.to(device).unsqueeze(-1)
    return steps
