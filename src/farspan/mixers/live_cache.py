"""What a dynamic-mask layer keeps while text is generated: the keys that its selection can still choose."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from farspan.errors import ConfigError
from farspan.mixers.cache import KeyValueCache, LayerCache
from farspan.ops.dynamic_mask.expiry import expiry
from farspan.ops.dynamic_mask.step import GONE, LiveKeys

Value = TypeVar("Value")

SLOTTED = ("keys", "values", "biases", "rankings", "born")


class BiasedKeyCache(KeyValueCache):
    """Keys, values and what else is known of a key, `[B, S, M]`, of every token or of the last `window − 1` real ones.

    Args:
        window: number of keys a query sees, itself included; None keeps all keys.
    """

    can_pin = False

    def append_with(
        self, keys: Tensor, values: Tensor, mask: Tensor | None, **more: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor]]:
        """As `append`; `more` are `[B, T, M]` of the new tokens, returned as `[B, S, M]` of all."""
        total = self.length + keys.shape[1]
        for name, x in more.items():
            self.tensors[name] = self._write(name, x.detach())
        held = {name: self._seen(name, x, total) for name, x in more.items()}
        return *self.append(keys, values, mask), held


class LiveKeyCache(LayerCache):
    """The w live keys of every row and bias head: an evicted key never returns, so nothing else is ever needed.

    Bias heads that share a key-value head keep the union of their keys. Memory is constant from w tokens per sharing
    bias head on. A ranking of −inf marks what a bias head has lost, and free slots; `born` is the age that decides
    between equals, `seen` counts the tokens of each row. Pinned, it has all room at once.

    Args:
        keep: w.
        sharing: R, bias heads per key-value head.
    """

    can_pin = True

    def __init__(self, keep: int, sharing: int) -> None:
        super().__init__()
        self.keep, self.sharing, self.bound = keep, sharing, keep * sharing
        self.length = 0
        self.pinned = False
        self._kept: Any = None

    def takes_step(self, tokens: int) -> bool:
        """Whether so many new tokens are one step, which changes the memory in place: gradients cannot pass that."""
        return tokens == 1 and self.length > 0 and not torch.is_grad_enabled()

    def once(self, compute: Callable[[], Value]) -> Value:
        """What `compute` gave at the first step; weights do not change while a text is generated."""
        if torch.compiler.is_compiling():
            return compute()
        if self._kept is None:
            self._kept = compute()
        kept: Value = self._kept
        return kept

    def live(self) -> LiveKeys:
        """The memory with a free slot, for one `dynamic_mask_step` to change."""
        if not self.pinned:
            self._make_room(self.length + 1, spare=True)
            self.length = min(self.length + 1, self.bound)
        return LiveKeys(**self.tensors)

    def pin(self, steps: int) -> None:
        self._make_room(self.length + steps)
        self.length = min(self.length + steps, self.bound)
        self.pinned = True

    def append(
        self, keys: Tensor, values: Tensor, bias: Tensor, ranking: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Adds any number of new tokens, and forgets what no later query can choose.

        Args:
            keys, values: `[B, T, G, K]` and `[B, T, G, V]`.
            bias, ranking: `[B, T, G·R]`.
            mask: `[B, T]` bool, True for real tokens, or None when all are real.

        Returns:
            Keys, values, biases and rankings of everything that the new queries may choose from, −inf where they may
            not, oldest first per key-value head, the new tokens last.
        """
        ranking = hidden(ranking, mask)
        seen = self.tensors.get("seen")
        if seen is None:
            seen = torch.zeros(len(keys), dtype=torch.int32, device=keys.device)
        born = seen[:, None] + torch.arange(keys.shape[1], dtype=torch.int32, device=keys.device)
        new = {
            "keys": keys,
            "values": values,
            "biases": bias.unflatten(2, (-1, self.sharing)),
            "rankings": ranking.detach().unflatten(2, (-1, self.sharing)),
            "born": born.unsqueeze(-1).expand(keys.shape[:3]),
        }
        held = self._extend(new)
        self.tensors["seen"] = seen + keys.shape[1]
        bias = held["biases"].masked_fill(held["rankings"] == GONE, GONE)
        return held["keys"], held["values"], bias.flatten(2), held["rankings"].flatten(2)

    def reset(self) -> None:
        super().reset()
        self.length, self.pinned, self._kept = 0, False, None

    def _extend(self, new: dict[str, Tensor]) -> dict[str, Tensor]:
        """Joins old and new, and keeps the slots of keys that have not expired at the end."""
        held = new
        if self.length:
            old = {name: self.tensors[name][:, : self.length] for name in new}
            order = old["born"].argsort(dim=1)
            held = {name: torch.cat((_take(old[name], order), x), dim=1) for name, x in new.items()}
        total = held["born"].shape[1]
        expires = expiry(held["rankings"].flatten(2), self.keep).unflatten(2, (-1, self.sharing))
        kept = {**held, "rankings": held["rankings"].masked_fill(expires < total, GONE)}
        if total > self.bound:
            gone = ~(kept["rankings"] > GONE).any(-1)
            order = gone.to(torch.int8).argsort(dim=1, stable=True)[:, : self.bound]
            kept = {name: _take(x.detach(), order) for name, x in kept.items()}
        else:
            kept = {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in kept.items()}
        self.tensors, self.length, self.pinned = kept, min(total, self.bound), False
        return held

    def _make_room(self, slots: int, spare: bool = False) -> None:
        """Grows the memory to so many free or used slots, to half as many again with `spare`; at most to the bound."""
        have = self.tensors["born"].shape[1]
        if have < min(slots, self.bound):
            more = min(slots + (slots // 2 if spare else 0), self.bound) - have
            for name in SLOTTED:
                x = self.tensors[name]
                # The channels behind the slots keep their sizes.
                free = GONE if name == "rankings" else 0
                self.tensors[name] = pad(x, (0, 0) * (x.dim() - 2) + (0, more), value=free)


class UnreturningCache(LayerCache):
    """For selections that look at the future: reads one prompt, and refuses to go on.

    Args:
        reason: what looks at the future.
    """

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason, self.used = reason, False

    def begin(self) -> None:
        """Called by every forward pass.

        Raises:
            ConfigError: from the second one on.
        """
        if self.used:
            raise ConfigError(
                f"dynamic_mask: {self.reason} looks at the future, so that earlier outputs change with every new token "
                "and cannot be cached. Generate with use_cache=False, or choose select='topk_causal', which keeps for "
                "each new token what a selection over all tokens so far would keep."
            )
        self.used = True

    def reset(self) -> None:
        self.used = False


def hidden(ranking: Tensor, mask: Tensor | None) -> Tensor:
    """Rankings `[B, T, M]`, −inf at padding."""
    return ranking if mask is None else ranking.masked_fill(~mask.unsqueeze(-1), GONE)


def _spread(index: Tensor, like: Tensor) -> Tensor:
    """`[B, C, G]` → `[B, C, G, …]` of like's further sizes."""
    return index.reshape(*index.shape, *[1] * (like.dim() - 3)).expand(*index.shape, *like.shape[3:])


def _take(x: Tensor, order: Tensor) -> Tensor:
    """The slots `order` `[B, C, G]` of `[B, S, G, …]`."""
    return x.gather(1, _spread(order, x))
