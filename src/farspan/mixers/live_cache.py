"""What a dynamic-mask layer keeps while text is generated: the keys that its selection can still choose."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from farspan.errors import ConfigError
from farspan.mixers.cache import KeyValueCache, LayerCache
from farspan.ops.dynamic_mask.expiry import expiry

GONE = float("-inf")


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
    bias head on. A ranking of −inf marks what a bias head has lost; `born` is the age that decides between equals.

    Args:
        keep: w.
        sharing: R, bias heads per key-value head.
    """

    def __init__(self, keep: int, sharing: int) -> None:
        super().__init__()
        self.keep, self.sharing, self.bound = keep, sharing, keep * sharing
        self.length = self.seen = 0

    def append(
        self, keys: Tensor, values: Tensor, bias: Tensor, ranking: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Adds new tokens, and forgets what no later query can choose.

        Args:
            keys, values: `[B, T, G, K]` and `[B, T, G, V]`.
            bias, ranking: `[B, T, G·R]`.
            mask: `[B, T]` bool, True for real tokens, or None when all are real.

        Returns:
            Keys, values, biases and rankings of everything that the new queries may choose from, −inf where they may
            not: where `steps` says so already selected, else oldest first per key-value head, the new tokens last.
        """
        if mask is not None:
            ranking = ranking.masked_fill(~mask.unsqueeze(-1), GONE)
        born = torch.arange(self.seen, self.seen + keys.shape[1], dtype=torch.int32, device=keys.device)
        new = {
            "keys": keys,
            "values": values,
            "bias": bias.unflatten(2, (-1, self.sharing)),
            "ranking": ranking.detach().unflatten(2, (-1, self.sharing)),
            "born": born[:, None].expand(keys.shape[:3]),
        }
        held = self._step(new) if self.steps(keys.shape[1]) else self._extend(new)
        self.seen += keys.shape[1]
        bias = held["bias"].masked_fill(held["ranking"] == GONE, GONE)
        return held["keys"], held["values"], bias.flatten(2), held["ranking"].flatten(2)

    def steps(self, tokens: int) -> bool:
        """Whether so many new tokens are one step, which changes the memory in place: gradients cannot pass that."""
        return tokens == 1 and self.length > 0 and not torch.is_grad_enabled()

    def reset(self) -> None:
        super().reset()
        self.length = self.seen = 0

    def _extend(self, new: dict[str, Tensor]) -> dict[str, Tensor]:
        """Any number of tokens: joins them, and keeps the slots of keys that have not expired at the end."""
        held = new
        if self.length:
            old = {name: x[:, : self.length] for name, x in self.tensors.items()}
            order = old["born"].argsort(dim=1)
            held = {name: torch.cat((_take(old[name], order), x), dim=1) for name, x in new.items()}
        total = held["born"].shape[1]
        expires = expiry(held["ranking"].flatten(2), self.keep).unflatten(2, (-1, self.sharing))
        kept = {**held, "ranking": held["ranking"].masked_fill(expires < total, GONE)}
        if total > self.bound:
            gone = ~(kept["ranking"] > GONE).any(-1)
            order = gone.to(torch.int8).argsort(dim=1, stable=True)[:, : self.bound]
            kept = {name: _take(x.detach(), order) for name, x in kept.items()}
        else:
            kept = {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in kept.items()}
        self.tensors, self.length = kept, min(total, self.bound)
        return held

    def _step(self, new: dict[str, Tensor]) -> dict[str, Tensor]:
        """One token: every bias head with more than w live keys drops its worst, of equals the oldest."""
        used = self.length
        ranking = torch.cat((self.tensors["ranking"][:, :used], new["ranking"]), dim=1)
        born = torch.cat((self.tensors["born"][:, :used], new["born"]), dim=1)
        live = ranking > GONE
        lowest = ranking.masked_fill(~live, -GONE).amin(1, keepdim=True)
        age = born.unsqueeze(-1).masked_fill(ranking != lowest, torch.iinfo(born.dtype).max)
        worst = age.argmin(1, keepdim=True)
        crowded = live.sum(1, keepdim=True) > self.keep
        ranking.scatter_(1, worst, ranking.gather(1, worst).masked_fill(crowded, GONE))
        new = {**new, "ranking": ranking[:, used:]}
        self.tensors["ranking"][:, :used] = ranking[:, :used]
        if used < self.bound:
            self._make_room(used + 1)
            for name, x in new.items():
                self.tensors[name][:, used : used + 1] = x
            self.length += 1
        else:
            # If the new key stays, a slot is free: of w keys per sharing bias head one has just died in every one's.
            free = (ranking[:, :used] > GONE).any(-1).to(torch.int8).argmin(1, keepdim=True)
            stays = (new["ranking"] > GONE).any(-1)
            for name, x in new.items():
                buffer = self.tensors[name]
                slot = _spread(free, buffer)
                buffer.scatter_(1, slot, torch.where(_spread(stays, buffer), x, buffer.gather(1, slot)))
        return {name: x[:, : self.length] for name, x in self.tensors.items()}

    def _make_room(self, slots: int) -> None:
        """Grows the buffers by half, at most to the bound."""
        have = self.tensors["born"].shape[1]
        if have < slots:
            more = min(slots + slots // 2, self.bound) - have
            # The channels behind the slots keep their sizes.
            self.tensors = {name: pad(x, (0, 0) * (x.dim() - 2) + (0, more)) for name, x in self.tensors.items()}


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


def _spread(index: Tensor, like: Tensor) -> Tensor:
    """`[B, C, G]` → `[B, C, G, …]` of like's further sizes."""
    return index.reshape(*index.shape, *[1] * (like.dim() - 3)).expand(*index.shape, *like.shape[3:])


def _take(x: Tensor, order: Tensor) -> Tensor:
    """The slots `order` `[B, C, G]` of `[B, S, G, …]`."""
    return x.gather(1, _spread(order, x))
