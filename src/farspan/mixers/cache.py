"""What one layer keeps while text is generated. `farspan.models.cache` binds a list of these to transformers."""

import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.mixers.layout import SequenceLayout
from farspan.ops.softmax.step import Ring

# What has one entry per token, beside what has one per row.
_SLOTTED = ("keys", "values", "mask")


class LayerCache:
    """Memory of one layer: a set of tensors whose first dimension is the batch.

    Subclasses hold their tensors in `self.tensors`; reordering for beam search, repeating, moving and counting bytes
    then need no further code.
    """

    # Whether tokens can be taken back. A recurrent state cannot, nor can a cache that has evicted keys.
    croppable = False
    # Whether a step can overwrite the memory in place, so that a CUDA graph of it can be replayed.
    can_pin = False

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def pin(self, steps: int) -> None:
        """From now on a step of one real token per row overwrites the memory in place, and asks the device for nothing.

        Args:
            steps: how many such steps the memory must have room for. Called again, it makes room for so many more.

        Raises:
            ConfigError: where `can_pin` is false.
        """
        raise ConfigError(f"{type(self).__name__} does not stay in one place: its steps cannot be replayed.")

    def select(self, rows: Tensor) -> None:
        """Keeps the given batch rows, in the given order (beam search, batch selection)."""
        self.tensors = {name: x.index_select(0, rows.to(x.device)) for name, x in self.tensors.items()}

    def repeat_interleave(self, repeats: int) -> None:
        """Repeats every batch row `repeats` times."""
        self.tensors = {name: x.repeat_interleave(repeats, dim=0) for name, x in self.tensors.items()}

    def reset(self) -> None:
        """Forgets everything."""
        self.tensors = {}

    def leave_inference_mode(self) -> None:
        """Replaces what was made under `torch.inference_mode`, which nothing outside of it may change."""
        self.tensors = {name: x.clone() if x.is_inference() else x for name, x in self.tensors.items()}

    def crop(self, tokens: int) -> None:
        """Takes back the newest `tokens` tokens.

        Raises:
            ConfigError: for a cache that cannot roll back.
        """
        if tokens:
            raise ConfigError(
                f"{type(self).__name__} cannot take back {tokens} tokens: it keeps no history to return to. "
                "Assisted decoding and prompt lookup need layers with a full key-value cache."
            )

    def nbytes(self) -> int:
        """Bytes of memory held."""
        return sum(x.untyped_storage().nbytes() for x in self.tensors.values())


class StateCache(LayerCache):
    """Constant-size memory: named states of recurrences and convolutions, e.g. `recurrent` and `convolution`."""

    can_pin = True

    def __init__(self) -> None:
        super().__init__()
        self._pinned = False

    def pin(self, steps: int) -> None:
        self._pinned = True

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self._pinned = False

    def repeat_interleave(self, repeats: int) -> None:
        super().repeat_interleave(repeats)
        self._pinned = False

    def reset(self) -> None:
        super().reset()
        self._pinned = False

    def get(self, name: str) -> Tensor | None:
        """The state stored under `name`, or None before the first update."""
        x = self.tensors.get(name)
        # Later steps change the state in place: what autograd saves must be another tensor.
        return x.clone() if x is not None and torch.is_grad_enabled() else x

    def update(self, **states: Tensor | None) -> None:
        """Replaces the named states (detached: a cache is for inference).

        A state that is a view of a larger tensor is copied, so that the cache never holds a whole prompt alive, as is
        one that autograd may have saved; all are contiguous, for steps that change them in place.
        """
        for name, x in states.items():
            if x is not None and self._pinned:
                self.tensors[name].copy_(x)
            elif x is not None:
                x, saved = x.detach().contiguous(), x.requires_grad
                view = torch.compiler.is_compiling() or saved or x.untyped_storage().nbytes() != x.nbytes
                self.tensors[name] = x.clone() if view else x


class KeyValueCache(LayerCache):
    """Keys and values of every token, or of the last `window − 1` real tokens of each row.

    Memory is `[B, S, G, K]` in a buffer that grows by half when it is full, so that a step costs amortised O(1) copies.
    Pinned, it has all its room at once, a ring of `window` slots where there is a window, and the device counts.

    Args:
        window: number of keys a query sees, itself included; None keeps all keys.
    """

    can_pin = True

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.length = 0
        self.croppable = window is None

    @property
    def filled(self) -> Tensor | None:
        """Of a pinned memory: `[B]` int32, tokens written so far, the next of which goes to slot filled mod S."""
        return self.tensors.get("filled")

    def takes_step(self, x: Tensor, layout: SequenceLayout) -> bool:
        """Whether `[B, 1, D]` is one real token per row behind a pinned memory, for a step that changes it in place."""
        return self.filled is not None and x.shape[1] == 1 and layout.padding_mask is None and layout.attentions is None

    def ring(self) -> Ring:
        """What a step of a pinned memory changes in place."""
        held = self.tensors
        return Ring(held["keys"], held["values"], held["filled"], held.get("mask"))

    def pin(self, steps: int) -> None:
        if self.filled is not None:
            if self.window is not None:
                return  # the ring goes on
            self.length = int(self.filled[0])
        elif "mask" in self.tensors:
            self._padding_first()
        slots = self.window or max(self.length + steps, self.tensors["keys"].shape[1])
        for name in filter(self.tensors.__contains__, _SLOTTED):
            x = self.tensors[name]
            if x.shape[1] != slots:
                x = x.new_zeros((len(x), slots, *x.shape[2:]))
                x[:, : self.length] = self.tensors[name][:, : self.length]
            x[:, self.length :] = 0
            self.tensors[name] = x.contiguous()
        keys = self.tensors["keys"]
        self.tensors["filled"] = torch.full((len(keys),), self.length, dtype=torch.int32, device=keys.device)

    def _padding_first(self) -> None:
        """Moves padding to the front of its row, where a ring overwrites it first and positions count on behind it."""
        mask = self.tensors["mask"][:, : self.length]
        if bool((mask[:, 1:] >= mask[:, :-1]).all()):
            return
        order = mask.to(torch.int8).argsort(dim=1, stable=True)
        for name in filter(self.tensors.__contains__, _SLOTTED):
            x = self.tensors[name][:, : self.length]
            self.tensors[name] = x.gather(1, order.reshape(*order.shape, *[1] * (x.dim() - 2)).expand_as(x))

    @property
    def keys(self) -> Tensor | None:
        """`[B, G, S, K]`, as the cache layers of transformers show them; None while empty."""
        return self._shown("keys")

    @property
    def values(self) -> Tensor | None:
        """`[B, G, S, V]`, as the cache layers of transformers show them; None while empty."""
        return self._shown("values")

    def _shown(self, name: str) -> Tensor | None:
        x = self.tensors.get(name)
        return None if x is None else x[:, : self.length].transpose(1, 2)

    def append(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Adds `[B, T, G, K]` keys and `[B, T, G, V]` values of new tokens; returns all that the new queries may see.

        Gradients reach the new tokens, not those that were stored by earlier calls.

        Args:
            keys, values: of the new tokens.
            mask: `[B, T]` bool, True for real tokens, or None when all are real.

        Returns:
            Keys `[B, S, G, K]`, values `[B, S, G, V]` and key mask `[B, S]` (None when all are real), S ≥ T; the new
            tokens are the last T.

        Raises:
            ConfigError: for a memory that a captured loop has used up.
        """
        if self.filled is not None:
            raise ConfigError("This cache was used up by `decode`; give model.new_cache().")
        new = keys.shape[1]
        if mask is not None or "mask" in self.tensors:
            self._ensure_mask(keys)
        stored = {"keys": keys, "values": values}
        if "mask" in self.tensors:
            stored["mask"] = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device) if mask is None else mask
        for name, x in stored.items():
            self.tensors[name] = self._write(name, x.detach())
        self.length += new
        keys, values = self._seen("keys", keys, self.length), self._seen("values", values, self.length)
        key_mask = self.tensors["mask"][:, : self.length] if "mask" in self.tensors else None
        if self.window is not None:
            self._evict(self.window - 1)
        return keys, values, key_mask

    def crop(self, tokens: int) -> None:
        if self.window is not None:
            super().crop(tokens)
        self.length = max(0, self.length - tokens)

    def reset(self) -> None:
        super().reset()
        self.length = 0

    def _ensure_mask(self, like: Tensor) -> None:
        if "mask" not in self.tensors:
            capacity = self.tensors["keys"].shape[1] if "keys" in self.tensors else 0
            self.tensors["mask"] = torch.ones((like.shape[0], capacity), dtype=torch.bool, device=like.device)

    def _write(self, name: str, x: Tensor) -> Tensor:
        """The buffer `name` with `x` written behind the first `self.length` entries, grown if needed."""
        buffer, end = self.tensors.get(name), self.length + x.shape[1]
        if buffer is None:
            return x.contiguous()
        if buffer.shape[1] < end:
            grown = buffer.new_empty((buffer.shape[0], end + end // 2, *buffer.shape[2:]))
            grown[:, : self.length] = buffer[:, : self.length]
            buffer = grown
        buffer[:, self.length : end] = x
        return buffer

    def _seen(self, name: str, new: Tensor, total: int) -> Tensor:
        """The first `total` entries of a buffer, whose last ones are `new`, in new's dtype."""
        held = self.tensors[name][:, :total].to(new.dtype)
        # Later calls write into the buffer: what autograd saves must be no part of it.
        return torch.cat((held[:, : total - new.shape[1]], new), dim=1) if torch.is_grad_enabled() else held

    def _evict(self, keep: int) -> None:
        """Keeps the last `keep` real tokens of every row, in order; the mask marks rows that have fewer."""
        if self.length <= keep:
            return
        live = {name: x[:, : self.length] for name, x in self.tensors.items()}
        if "mask" in live:
            # A stable sort brings padding to the front, so that a plain slice keeps the newest real tokens.
            order = live["mask"].to(torch.int8).argsort(dim=1, stable=True)[:, self.length - keep :]
            live = {
                name: x.gather(1, order.reshape(*order.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))
                for name, x in live.items()
            }
            self.tensors = live
        else:
            self.tensors = {name: x[:, self.length - keep :].clone() for name, x in live.items()}
        self.length = keep
