"""`FarspanConfig`: one configuration for every mix of mechanisms, checked when it is built."""

import dataclasses
import typing
from dataclasses import field
from typing import Any, ClassVar, Literal

from transformers.configuration_utils import PreTrainedConfig

from farspan.errors import ConfigError, nearest
from farspan.mixers.base import MIXERS
from farspan.models.vision_options import check_vision
from farspan.nn.feed_forward import FEED_FORWARDS, activation
from farspan.nn.norms import NORMS
from farspan.nn.options import fits, words
from farspan.nn.positions import check_rope_parameters

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]
# Words of transformers for the kinds of cache a mixer declares.
_LAYER_TYPES = {
    "kv": "full_attention",
    "window": "sliding_attention",
    "state": "linear_attention",
    "state+kv": "hybrid",
}
# What transformers itself passes or stores beside the declared fields.
_FOREIGN_KEYS = {
    "_attn_implementation",
    "_commit_hash",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
}


class FarspanConfig(PreTrainedConfig):
    """Describes one stack: which mixer and which feed-forward each layer has, and their sizes.

    `mixers` and `feed_forwards` are lists of registered names. A full list sets the depth; a shorter pattern is
    repeated and must divide `num_hidden_layers`. Options of one mechanism go into `mixer_options[name]`, never into
    flat fields.

    Args:
        vocab_size: number of token ids; 0 has no token embeddings, the input is then `inputs_embeds`.
        hidden_size: model width D.
        intermediate_size: inner width of the feed-forwards; None is 8/3·D rounded up to a multiple of 64.
        num_hidden_layers: depth; None takes the length of `mixers` (8 if that is empty).
        num_attention_heads: heads H of every mixer.
        num_key_value_heads: key-value heads G of mixers that share them; None is H.
        head_dim: channels per head of mixers that have one head size; None is D/H.
        mixers: names per layer, or a pattern; empty is `softmax` everywhere.
        feed_forwards: names per layer, or a pattern; empty is `gated_mlp` everywhere.
        mixer_options: mixer name → the fields of its options dataclass.
        feed_forward_options: feed-forward name → the fields of its options dataclass.
        max_position_embeddings: the trained length; scaled positions stretch relative to it. It limits nothing.
        rope_parameters: `{"rope_type": "default" | "linear" | "dynamic" | "yarn", "rope_theta": 10000.0, …}`.
        norm_type: `rms_norm`, `layer_norm`, `simple_rms_norm` (no parameters) or `neox_rms_norm` (eps outside).
        norm_eps: epsilon of the norms.
        norm_place: `pre` (norm before each branch), `post` (after each addition, as BERT), or `sub`: as `pre`, with a
            second norm inside every branch (sub-LN: sets `sub_norm` in the options of all mixers and feed-forwards) and
            the initialisation that belongs to it.
        final_norm: whether a norm follows the last layer; None has one unless `norm_place` is `post`.
        use_parallel_residual: whether mixer and feed-forward read the same input (GPT-NeoX) instead of one another's.
        shared_parallel_norm: whether they then share one norm (GPT-J).
        residual_scaling: what multiplies the residual stream at each addition: `none`, `per_channel` (learned, Doge) or
            `deepnorm` ((2·layers)^¼, with the initialisation that belongs to it; meant for `norm_place="post"`).
        position_embedding: `none`, or `learned` (a table added to the token embeddings; limits the length).
        position_embedding_offset: rows of that table before position 0.
        type_vocab_size: number of token types, whose embeddings are added; 0 has none.
        embedding_scale: factor of the token embeddings.
        embedding_norm: whether a norm follows the sum of the embeddings.
        embedding_dropout: dropout on the embeddings.
        hidden_act: activation of the feed-forwards.
        hidden_dropout: dropout on each branch before it is added to the residual stream.
        drop_path_rate: probability that the last layer leaves out a branch in training; grows linearly from 0.
        lm_head_bias: whether the language-model head has a bias.
        pooler: whether the stack ends with BERT's pooler, tanh of a linear map of the first token.
        next_sentence_head: whether the masked language model also says if two sentences follow one another.
        classifier_pooling: which state of a row a sequence classifier reads: `last` or `first` real token, `mean` of
            the real tokens, or `pooler`; None takes `pooler` if there is one, else `last` (causal), `first` (with a
            class token) or `mean`.
        classifier_bias: whether classifiers have a bias.
        classifier_dropout: dropout before classifiers.
        problem_type: what classifiers of texts and images learn; None is decided by the first labels.
        vision: fields of `VisionOptions` for models that read images or features of their tiles; None for text.
        causal: whether a token sees only its past. False needs mixers that can look both ways.
        initializer_range: standard deviation of linear and embedding weights at initialisation.
        tie_word_embeddings: whether the head is the embedding.
        use_cache: whether forward returns a cache by default.

    Raises:
        ConfigError: for any value, name, key or combination that is not accepted, naming the field and what is.

    Example:
        >>> config = FarspanConfig(vocab_size=256, hidden_size=64, num_attention_heads=2, mixers=["metala", "softmax"])
        >>> config.num_hidden_layers, config.layer_types
        (2, ['linear_attention', 'full_attention'])
    """

    model_type = "farspan"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "mlm_loss", "nsp_loss"]
    base_model_tp_plan: ClassVar[None] = None

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    mixers: list[str] = field(default_factory=list)
    feed_forwards: list[str] = field(default_factory=list)
    mixer_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    feed_forward_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] = field(default_factory=dict)
    norm_type: str = "rms_norm"
    norm_eps: float = 1e-6
    norm_place: Literal["pre", "post", "sub"] = "pre"
    final_norm: bool | None = None
    use_parallel_residual: bool = False
    shared_parallel_norm: bool = False
    residual_scaling: Literal["none", "per_channel", "deepnorm"] = "none"
    position_embedding: Literal["none", "learned"] = "none"
    position_embedding_offset: int = 0
    type_vocab_size: int = 0
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    embedding_dropout: float = 0.0
    hidden_act: str = "silu"
    hidden_dropout: float = 0.0
    drop_path_rate: float = 0.0
    lm_head_bias: bool = False
    pooler: bool = False
    next_sentence_head: bool = False
    classifier_pooling: Literal["last", "first", "mean", "pooler"] | None = None
    classifier_bias: bool = False
    classifier_dropout: float = 0.0
    problem_type: ProblemType | None = None
    vision: dict[str, Any] | None = None
    causal: bool = True
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for key in kwargs:
            if key not in _FOREIGN_KEYS:
                raise ConfigError(f"Unknown config field {key!r}: {nearest(key, _own_fields())}")
        classes = kwargs.get("num_labels")
        if not fits(classes, int | None) or (classes or 0) < 0:
            raise ConfigError(f"num_labels={classes!r} is no number of classes; accepted: 0 (no classifier) and above.")
        self._check_values()
        self._check_description()
        self._fill_defaults()
        self._check_blocks()
        super().__post_init__(**kwargs)

    def _check_values(self) -> None:
        hints = _own_fields()
        for name, hint in hints.items():
            value = getattr(self, name)
            if not fits(value, hint):
                raise ConfigError(f"{name}={value!r} is of the wrong type; accepted: {words(hint)}.")
        for name in ("hidden_size", "num_attention_heads", "max_position_embeddings"):
            _positive(name, getattr(self, name))
        for name in ("vocab_size", "type_vocab_size", "position_embedding_offset"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative.")
        for name in ("intermediate_size", "num_hidden_layers", "num_key_value_heads", "head_dim"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        for name in ("hidden_dropout", "embedding_dropout", "classifier_dropout", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must lie in [0, 1).")
        if self.norm_eps <= 0 or self.initializer_range < 0:
            raise ConfigError(
                f"norm_eps={self.norm_eps} must be positive and initializer_range={self.initializer_range} must not be "
                "negative."
            )
        if self.norm_type not in NORMS:
            raise ConfigError(f"Unknown norm_type {self.norm_type!r}: {nearest(self.norm_type, NORMS)}")
        activation(self.hidden_act)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, list) else [value]:
                if token is not None and self.vocab_size and not 0 <= token < self.vocab_size:
                    raise ConfigError(
                        f"{name}={token} is no token id; ids are 0 to vocab_size - 1 = {self.vocab_size - 1}."
                    )

    def _check_description(self) -> None:
        """Combinations of the block description that mean nothing."""
        if self.shared_parallel_norm and not self.use_parallel_residual:
            raise ConfigError("shared_parallel_norm=true needs use_parallel_residual=true.")
        if self.use_parallel_residual and (self.norm_place != "pre" or self.residual_scaling != "none"):
            raise ConfigError(
                f"use_parallel_residual=true needs norm_place='pre' and residual_scaling='none', got "
                f"{self.norm_place!r} and {self.residual_scaling!r}."
            )
        if self.residual_scaling == "deepnorm" and self.norm_place == "sub":
            raise ConfigError(
                "residual_scaling='deepnorm' and norm_place='sub' are two ways to the same end; leave one out, and "
                "choose norm_place='post' for the former."
            )
        if self.next_sentence_head and not self.pooler:
            raise ConfigError("next_sentence_head=true reads the pooler; set pooler=true.")
        if self.classifier_pooling == "pooler" and not self.pooler:
            raise ConfigError("classifier_pooling='pooler' needs pooler=true; or choose 'last', 'first' or 'mean'.")
        if self.vision is not None:
            check_vision(self)
        if self.tie_word_embeddings and self.vocab_size == 0:
            raise ConfigError("tie_word_embeddings=true needs token embeddings; set vocab_size or leave the tie out.")

    def _fill_defaults(self) -> None:
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                divisors = [str(n) for n in range(1, min(self.hidden_size, 64) + 1) if self.hidden_size % n == 0]
                raise ConfigError(
                    f"hidden_size={self.hidden_size} is not divisible by num_attention_heads="
                    f"{self.num_attention_heads}; choose num_attention_heads from {', '.join(divisors)}, or set "
                    "head_dim."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            divisors = [str(n) for n in range(1, self.num_attention_heads + 1) if self.num_attention_heads % n == 0]
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by num_key_value_heads="
                f"{self.num_key_value_heads}; choose num_key_value_heads from {', '.join(divisors)}."
            )
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // (3 * 64)) * 64
        self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, **self.rope_parameters}
        check_rope_parameters(self.rope_parameters)
        self.mixer_options = {name: dict(values) for name, values in self.mixer_options.items()}
        self.feed_forward_options = {name: dict(values) for name, values in self.feed_forward_options.items()}
        depth = self.num_hidden_layers or len(self.mixers) or 8
        self.mixers = _repeated("mixers", self.mixers or ["softmax"], depth)
        self.feed_forwards = _repeated("feed_forwards", self.feed_forwards or ["gated_mlp"], depth)
        self.num_hidden_layers = depth
        if self.final_norm is None:
            self.final_norm = self.norm_place != "post"
        if self.classifier_pooling is None:
            first = self.vision is not None and self.vision.get("class_token", False)
            self.classifier_pooling = (
                "pooler" if self.pooler else "last" if self.causal else "first" if first else "mean"
            )
        if self.norm_place == "sub":
            self._add_inner_norms()

    def _add_inner_norms(self) -> None:
        for registry, names, options in (
            (MIXERS, self.mixers, self.mixer_options),
            (FEED_FORWARDS, self.feed_forwards, self.feed_forward_options),
        ):
            for name in dict.fromkeys(names):
                if "sub_norm" not in typing.get_type_hints(registry.get(name)[1]):
                    raise ConfigError(f"norm_place='sub' needs a norm inside every branch; {name!r} has none.")
                options.setdefault(name, {}).setdefault("sub_norm", True)

    def _check_blocks(self) -> None:
        for name in dict.fromkeys(self.mixers):
            MIXERS.build_options(name, self.mixer_options.get(name))
            if not self.causal and not MIXERS.get(name)[0].bidirectional:
                raise ConfigError(f"Mixer {name!r} is causal only; causal=false needs mixers that look both ways.")
        for name in dict.fromkeys(self.feed_forwards):
            FEED_FORWARDS.build_options(name, self.feed_forward_options.get(name))
        for which, options, names in (
            ("mixer_options", self.mixer_options, self.mixers),
            ("feed_forward_options", self.feed_forward_options, self.feed_forwards),
        ):
            for name in options:
                if name not in names:
                    raise ConfigError(f"{which} has options for {name!r}, which no layer uses: {nearest(name, names)}")

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` holds: the fields. Loading refuses other attributes, so they are not written."""
        known = {own.name for own in dataclasses.fields(self)} | _FOREIGN_KEYS
        return {key: value for key, value in super().to_dict().items() if key in known}

    @property
    def layer_types(self) -> list[str]:
        """Each layer's kind of cache in the words of transformers; read-only, not saved."""
        kinds = {}
        for name in dict.fromkeys(self.mixers):
            mixer, _ = MIXERS.get(name)
            options = MIXERS.build_options(name, self.mixer_options.get(name))
            kinds[name] = _LAYER_TYPES[mixer.cache_kind(options)]
        return [kinds[name] for name in self.mixers]


def _own_fields() -> dict[str, Any]:
    """The fields declared here and their annotations; those of the base class are checked by it."""
    return {
        name: hint for name, hint in FarspanConfig.__annotations__.items() if typing.get_origin(hint) is not ClassVar
    }


def _repeated(field: str, names: list[str], depth: int) -> list[str]:
    if not names or depth % len(names):
        raise ConfigError(
            f"{field} names {len(names)} layers, which does not divide num_hidden_layers={depth}; give one name per "
            "layer, or a pattern whose length divides the depth."
        )
    return list(names) * (depth // len(names))


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name}={value} must be at least 1.")
