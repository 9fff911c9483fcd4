"""What a dilated layer keeps while text is generated: the keys that a later query can still see."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.mixers.cache import LayerCache
from farspan.mixers.layout import SequenceLayout
from farspan.ops.dilated.live import LivePattern, dilated_attention_live, write_live
from farspan.ops.dilated.patterns import DilatedSettings
from farspan.ops.dilated.step import dilated_attention_step


class DilatedCache(LayerCache):
    """The keys and values that a later query can still see, per pattern, and the number of tokens each row has read.

    The buffers grow by half when they are full, up to ⌈w/r⌉ rows (times the offsets that share a key head) and a spare.
    Pinned, they have the room that they were asked for.

    Args:
        patterns: from `live_patterns`.
    """

    can_pin = True

    def __init__(self, patterns: Sequence[LivePattern]) -> None:
        super().__init__()
        self.patterns = list(patterns)
        self.length = 0
        self._room = 0
        self._pinned = False
        self._settings: DilatedSettings | None = None
        self._turned = False

    def pin(self, steps: int) -> None:
        self._grow(self.length + steps)
        self.length += steps
        self._pinned, self._settings = True, None

    def settings(self, form: Callable[[], DilatedSettings]) -> DilatedSettings:
        """What `form` gives; pinned, what it gave at the first step: weights do not change while text is generated."""
        if not self._pinned:
            return form()
        if self._settings is None:
            self._settings = form()
        return self._settings

    def write(self, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        """Reads the first tokens, `[B, T, G, K]` and `[B, T, G, V]`; mask `[B, T]`, None when all are real."""
        self._make_room(k, v)
        real = _real(k, mask)
        write_live(self.patterns, self._buffers(), k.detach(), v.detach(), (real.cumsum(1) - 1).clamp(min=0), real)
        self._advance(real)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, settings: DilatedSettings) -> Tensor:
        """Attention of further tokens, `[B, T, H, V]`, which are then part of the past.

        Raises:
            ConfigError: with `zero_keys` where a dilation does not divide its segment: that needs past queries.
        """
        self._refuse_filling(settings, q.shape[1])
        self._make_room(k, v)
        real = _real(k, mask)
        out = dilated_attention_live(
            q,
            k,
            v,
            patterns=self.patterns,
            buffers=self._buffers(),
            seen=self.tensors["seen"],
            real=real,
            settings=settings,
        )
        self._advance(real)
        return out

    def seen(self) -> Tensor | int:
        """Real tokens that each row has read, `[B, 1]`; 0 before the first."""
        return self.tensors["seen"].unsqueeze(1) if "seen" in self.tensors else 0

    def turned(self, ahead: bool) -> bool:
        """Whether kept keys were turned before they came: as the first ones, whatever the dtype of the next."""
        if "seen" not in self.tensors:
            self._turned = ahead
        return self._turned

    def takes_step(self, x: Tensor, layout: SequenceLayout) -> bool:
        """Whether `[B, 1, D]` is one real token per row behind others: what a step that changes the memory serves."""
        alone = x.shape[1] == 1 and self.length > 0 and layout.padding_mask is None
        return alone and not (torch.is_grad_enabled() or torch.compiler.is_compiling())

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, settings: DilatedSettings, cos: Tensor | None, sin: Tensor | None
    ) -> Tensor:
        """As `attend` for one real token per row that is not rotated yet, `[B, 1, H, V]`."""
        self._refuse_filling(settings, 1)
        self._make_room(k, v)
        held = {"patterns": self.patterns, "buffers": self._buffers(), "seen": self.tensors["seen"]}
        out = dilated_attention_step(q, k, v, **held, settings=settings, cos=cos, sin=sin)  # type: ignore[arg-type]
        if not self._pinned:
            self.length += 1
        return out

    def reset(self) -> None:
        super().reset()
        self.length, self._room, self._pinned, self._settings = 0, 0, False, None

    def _buffers(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.tensors[f"keys{i}"], self.tensors[f"values{i}"]) for i in range(len(self.patterns))]

    def _refuse_filling(self, settings: DilatedSettings, new: int) -> None:
        if settings.filling([(0, self.length + new)]):
            raise ConfigError(
                "pad_mode='zero_keys' with a dilation that does not divide its segment length puts outputs of past "
                "queries in the place of new ones, which no cache holds; use pad_mode='mask', or use_cache=False."
            )

    def _make_room(self, k: Tensor, v: Tensor) -> None:
        rows, new = k.shape[:2]
        if "seen" not in self.tensors:
            self.tensors["seen"] = torch.zeros(rows, dtype=torch.int64, device=k.device)
            for i in range(len(self.patterns)):
                for name, like in ((f"keys{i}", k), (f"values{i}", v)):
                    self.tensors[name] = torch.zeros((rows, 0, *like.shape[2:]), dtype=like.dtype, device=like.device)
        if not self._pinned and self.length + new > self._room:
            self._grow(self.length + new + ((self.length + new) // 2 if self._room else 0))

    def _grow(self, room: int) -> None:
        self._room = max(room, self._room)
        for i, pattern in enumerate(self.patterns if "seen" in self.tensors else ()):
            for name in (f"keys{i}", f"values{i}"):
                self.tensors[name] = pattern.grown(self.tensors[name], self._room)

    def _advance(self, real: Tensor) -> None:
        if self._pinned:
            self.tensors["seen"].add_(real.sum(1))
        else:
            self.tensors["seen"] = self.tensors["seen"] + real.sum(1)
            self.length += real.shape[1]


def _real(x: Tensor, mask: Tensor | None) -> Tensor:
    """Which tokens of `[B, T, …]` are real, `[B, T]`."""
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
