"""The mixer contract and registry: all that the model knows of a sequence mixer."""

from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from farspan.errors import ConfigError
from farspan.mixers.cache import LayerCache, StateCache
from farspan.mixers.layout import SequenceLayout
from farspan.nn.registry import Registry

CacheKind = Literal["kv", "window", "state", "state+kv"]


class MixerShape(Protocol):
    """What a mixer may read of the model's config; `FarspanConfig` satisfies it."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_parameters: dict[str, Any]
    causal: bool


class Mixer(nn.Module):
    """Base class of everything that moves information between tokens.

    A subclass is built as `Class(config, options, layer_idx)`: `config` offers the fields of `MixerShape`, `options` is
    the dataclass that was registered with it. It declares what the class attributes below say and implements `forward`,
    `new_cache`, `flops_per_token` and `state_bytes`.

    Attributes:
        bidirectional: whether `config.causal=False` is supported.
        operators: names of the operators it calls, whose backends decide where it is fast (`farspan info`).
        compact_cache: whether its cache is right behind a prompt with a compact layout (`SequenceLayout.compact`).
        attention_weights: whether it can say how much a query reads of every key (`SequenceLayout.observed`).
        shards: how it runs when a sequence is cut over ranks: `"state"` (passes boundary states), `"keys"` (gathers
            keys and values) or None (not at all: it then refuses a `sequence_parallel` context).
        no_weight_decay: names of the module's own parameters that the optimiser must not shrink; parameters with
            fewer than two dimensions are never shrunk.
    """

    bidirectional: ClassVar[bool] = False
    operators: ClassVar[tuple[str, ...]] = ()
    compact_cache: ClassVar[bool] = False
    attention_weights: ClassVar[bool] = False
    shards: ClassVar[Literal["state", "keys"] | None] = None
    no_weight_decay: tuple[str, ...] = ()

    def __call__(self, *args: Any, **arguments: Any) -> Any:
        if arguments.get("sequence_parallel") is not None and self.shards is None:
            raise ConfigError(f"{type(self).__name__} cannot run on a sequence that is cut over ranks.")
        return super().__call__(*args, **arguments)

    @staticmethod
    def cache_kind(options: Any) -> CacheKind:
        """`"kv"` grows with the text, `"window"` evicts, `"state"` is constant, `"state+kv"` has both."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        *,
        layout: SequenceLayout,
        cache: LayerCache | None = None,
        sequence_parallel: Any = None,
    ) -> Tensor:
        """Mixes `[B, T, D]` over T.

        Args:
            x: `[B, T, D]` normalised hidden states.
            layout: positions, padding and document boundaries of these tokens.
            cache: memory of earlier tokens, updated in place; decoding is this call with T = 1.
            sequence_parallel: the context of a sequence cut over ranks, or None.

        Returns:
            `[B, T, D]`; rows of padded tokens are unspecified but finite.
        """
        raise NotImplementedError

    def new_cache(self) -> LayerCache:
        """An empty cache of the kind that `forward` takes."""
        raise NotImplementedError

    def flops_per_token(self, length: int) -> float:
        """Forward operations per token, 2 per multiply-add, averaged over a causal sequence of `length` tokens."""
        raise NotImplementedError

    def state_bytes(self, length: int, dtype: torch.dtype) -> int:
        """Bytes of cache for one sequence after `length` tokens, for activations of `dtype`."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Initialises what the model's default (normal linears and embeddings) does not know."""


class StateMixer(Mixer):
    """A mixer whose memory is a `StateCache`: of constant size."""

    @staticmethod
    def cache_kind(options: Any) -> CacheKind:
        return "state"

    def new_cache(self) -> LayerCache:
        return StateCache()


def takes_step(x: Tensor, layout: SequenceLayout, cache: StateCache) -> bool:
    """Whether `[B, 1, D]` is one real token per row behind a state: what a step that changes the state in place serves.

    With gradients, or under torch.compile, the whole operator runs instead.
    """
    return (
        x.shape[1] == 1
        and layout.padding_mask is None
        and "recurrent" in cache.tensors
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


MIXERS: Registry[Mixer] = Registry(
    "mixer",
    {
        "collinear": "farspan.mixers.collinear:CollinearMixer:CollinearOptions",
        "cosine": "farspan.mixers.cosine:CosineMixer:CosineOptions",
        "dilated": "farspan.mixers.dilated:DilatedMixer:DilatedOptions",
        "dynamic_mask": "farspan.mixers.dynamic_mask:DynamicMaskMixer:DynamicMaskOptions",
        "metala": "farspan.mixers.metala:MetaLAMixer:MetaLAOptions",
        "sliding_softmax": "farspan.mixers.softmax:SoftmaxMixer:SlidingSoftmaxOptions",
        "softmax": "farspan.mixers.softmax:SoftmaxMixer:SoftmaxOptions",
        "ssd": "farspan.mixers.ssd:SSDMixer:SSDOptions",
    },
)


def register_mixer(name: str, mixer: type[Mixer], options: type) -> None:
    """Makes `FarspanConfig(mixers=[name])` build `mixer`.

    Args:
        name: how configs call it; must be free.
        mixer: a subclass of `Mixer`.
        options: the dataclass of its options; `mixer_options={name: {...}}` sets its fields.

    Raises:
        ConfigError: if the name is taken or `options` is no dataclass.
    """
    MIXERS.register(name, mixer, options)


def linear_flops(*layers: nn.Linear) -> float:
    """Operations per token of linear layers: 2 per weight."""
    return 2.0 * sum(layer.weight.numel() for layer in layers)


def mean_keys_seen(length: int, window: int | None, causal: bool) -> float:
    """Keys that a query sees, averaged over a sequence of `length` tokens, for counts of operations.

    Args:
        length: tokens of the sequence, at least 1.
        window: of `softmax_attention`; None is all.
        causal: whether row t = 1 … length sees min(t, window) keys.
    """
    window = min(window or length, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length if causal else float(window)
