"""What a dynamic-mask layer keeps while text is generated: the keys that its selection can still choose."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from farspan.errors import ConfigError
from farspan.mixers.cache import KeyValueCache, LayerCache
from farspan.ops.dynamic_mask.expiry import expiry

GONE = float("-inf")
# Biases of one token, formed by matrix products of different shapes in different calls, differ by this many roundings.
SAME_TOKEN = 16


class BiasedKeyCache(KeyValueCache):
    """Keys, values and biases `[B, S, M]` of every token, or of the last `window − 1` real tokens of each row.

    Args:
        window: number of keys a query sees, itself included; None keeps all keys.
        ranked: whether biases are compared with each other, so that those of one token must be equal.
    """

    def __init__(self, window: int | None = None, ranked: bool = False) -> None:
        super().__init__(window)
        self.ranked = ranked

    def append_biased(
        self, keys: Tensor, values: Tensor, bias: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """As `append`, with `[B, T, M]` biases of the new tokens and `[B, S, M]` of all."""
        bias = bias.detach()
        if self.ranked and self.length:
            bias = settled(bias, self.tensors["bias"][:, : self.length])
        buffer = self.tensors["bias"] = self._write("bias", bias)
        bias = buffer[:, : self.length + bias.shape[1]]
        keys, values, mask = self.append(keys, values, mask)
        return keys, values, bias, mask


class LiveKeyCache(LayerCache):
    """The w live keys of every row and bias head: an evicted key never returns, so nothing else is ever needed.

    Bias heads that share a key-value head keep the union of their keys. Memory is constant from w tokens per sharing
    bias head on; `born` holds the age that decides between equal biases.

    Args:
        keep: w.
        sharing: R, bias heads per key-value head.
    """

    def __init__(self, keep: int, sharing: int) -> None:
        super().__init__()
        self.keep, self.sharing, self.bound = keep, sharing, keep * sharing
        self.length = self.seen = 0

    def append(self, keys: Tensor, values: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Adds new tokens, and forgets what no later query can choose.

        Args:
            keys, values: `[B, T, G, K]` and `[B, T, G, V]`.
            bias: `[B, T, G·R]`; −inf for padding.

        Returns:
            Keys, values and biases of everything that the new queries may choose from, oldest first per key-value head
            for T > 1, the new tokens last; for T = 1 already selected, with a bias of −inf at all other keys.
        """
        new = {
            "keys": keys.detach(),
            "values": values.detach(),
            "bias": bias.detach().unflatten(2, (-1, self.sharing)),
            "born": torch.full(keys.shape[:3], self.seen, dtype=torch.int32, device=keys.device),
        }
        new["born"] += torch.arange(keys.shape[1], dtype=torch.int32, device=keys.device)[:, None]
        if self.length:
            known = self.tensors["bias"][:, : self.length]
            new["bias"] = settled(new["bias"].flatten(2), known.flatten(2)).unflatten(2, (-1, self.sharing))
        self.seen += keys.shape[1]
        one = keys.shape[1] == 1 and self.length > 0
        held = self._step(new) if one else self._extend(new)
        return held["keys"], held["values"], held["bias"].flatten(2)

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
        expires = expiry(held["bias"].flatten(2), self.keep).unflatten(2, (-1, self.sharing))
        kept = {**held, "bias": held["bias"].masked_fill(expires < total, GONE)}
        if total > self.bound:
            gone = ~(kept["bias"] > GONE).any(-1)
            order = gone.to(torch.int8).argsort(dim=1, stable=True)[:, : self.bound]
            kept = {name: _take(x, order) for name, x in kept.items()}
        else:
            kept = {name: x.clone(memory_format=torch.contiguous_format) for name, x in kept.items()}
        self.tensors, self.length = kept, min(total, self.bound)
        return held

    def _step(self, new: dict[str, Tensor]) -> dict[str, Tensor]:
        """One token: every bias head with more than w live keys drops its worst, of equals the oldest."""
        used = self.length
        bias = torch.cat((self.tensors["bias"][:, :used], new["bias"]), dim=1)
        born = torch.cat((self.tensors["born"][:, :used], new["born"]), dim=1)
        live = bias > GONE
        lowest = bias.masked_fill(~live, -GONE).amin(1, keepdim=True)
        age = born.unsqueeze(-1).masked_fill(bias != lowest, torch.iinfo(born.dtype).max)
        worst = age.argmin(1, keepdim=True)
        crowded = live.sum(1, keepdim=True) > self.keep
        bias.scatter_(1, worst, bias.gather(1, worst).masked_fill(crowded, GONE))
        new = {**new, "bias": bias[:, used:]}
        if used < self.bound:
            self._make_room(used + 1)
            self.tensors["bias"][:, :used] = bias[:, :used]
            for name, x in new.items():
                self.tensors[name][:, used : used + 1] = x
            self.length += 1
        else:
            # If the new key stays, one of the slots is free: w per sharing bias head, and one of theirs just died.
            self.tensors["bias"][:, :used] = bias[:, :used]
            free = (bias[:, :used] > GONE).any(-1).to(torch.int8).argmin(1, keepdim=True)
            stays = (new["bias"] > GONE).any(-1)
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


def settled(bias: Tensor, known: Tensor) -> Tensor:
    """New biases, each replaced by a known one of its head where that is equal up to rounding.

    Equal biases are decided by age, so a token that repeats must have the bias it had before, in its last bit; matrix
    products of different shapes do not grant that.

    Args:
        bias: `[B, T, M]`.
        known: `[B, S, M]`, −inf for forgotten ones.

    Returns:
        `[B, T, M]`.
    """
    tolerance = SAME_TOKEN * torch.finfo(bias.dtype).eps
    values = bias.transpose(1, 2).contiguous()
    ordered = known.transpose(1, 2).sort(dim=-1).values
    after = torch.searchsorted(ordered, values)
    last = ordered.shape[-1] - 1
    for place in ((after - 1).clamp(min=0), after.clamp(max=last)):
        near = ordered.gather(-1, place)
        values = torch.where((near - values).abs() <= tolerance * values.abs(), near, values)
    return values.transpose(1, 2)


def _spread(index: Tensor, like: Tensor) -> Tensor:
    """`[B, C, G]` → `[B, C, G, …]` of like's further sizes."""
    return index.reshape(*index.shape, *[1] * (like.dim() - 3)).expand(*index.shape, *like.shape[3:])


def _take(x: Tensor, order: Tensor) -> Tensor:
    """The slots `order` `[B, C, G]` of `[B, S, G, …]`."""
    return x.gather(1, _spread(order, x))
