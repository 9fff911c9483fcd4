"""The one stack: embeddings, blocks of mixer and feed-forward, final norm, language-model head."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.utils import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from farspan.errors import ConfigError, ShapeError, nearest
from farspan.mixers.base import MIXERS, Mixer
from farspan.mixers.cache import LayerCache
from farspan.mixers.layout import SequenceLayout
from farspan.models.cache import FarspanCache, positions_of
from farspan.models.configuration import FarspanConfig
from farspan.nn.feed_forward import FEED_FORWARDS, AuxiliaryRecord, FeedForward
from farspan.nn.losses import IGNORE_INDEX, chunked_cross_entropy
from farspan.nn.norms import make_norm
from farspan.ops import varlen

# What tokenizers, collators and versions of transformers pass along for other models; it has no meaning here.
_IGNORED_ARGUMENTS = frozenset(
    (
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "max_length_k",
        "max_length_q",
        "seq_idx",
        "special_tokens_mask",
        "token_type_ids",
    )
)


class FarspanBlock(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: FarspanConfig, layer_idx: int) -> None:
        super().__init__()
        mixer, feed_forward = config.mixers[layer_idx], config.feed_forwards[layer_idx]
        mixer_class, _ = MIXERS.get(mixer)
        mixer_options = MIXERS.build_options(mixer, config.mixer_options.get(mixer))
        feed_forward_class, _ = FEED_FORWARDS.get(feed_forward)
        feed_forward_options = FEED_FORWARDS.build_options(feed_forward, config.feed_forward_options.get(feed_forward))
        self.mixer_norm = make_norm(config.norm_type, config.hidden_size, config.norm_eps)
        self.mixer: Mixer = mixer_class(config, mixer_options, layer_idx)
        self.feed_forward_norm = make_norm(config.norm_type, config.hidden_size, config.norm_eps)
        self.feed_forward: FeedForward = feed_forward_class(config, feed_forward_options)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self, x: Tensor, *, layout: SequenceLayout, cache: LayerCache | None = None
    ) -> tuple[Tensor, AuxiliaryRecord | None]:
        x = x + self.dropout(self.mixer(self.mixer_norm(x), layout=layout, cache=cache))
        known = {"padding_mask": layout.padding_mask} if self.feed_forward.reads_padding else {}
        y, aux = self.feed_forward(self.feed_forward_norm(x), **known)
        return x + self.dropout(y), aux


class FarspanPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving, shared by all Farspan models."""

    config: FarspanConfig
    config_class = FarspanConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("FarspanBlock",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True

    def __init__(self, config: FarspanConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        # A state cannot be rolled back, nor can a window that has evicted keys: transformers then refuses assisted
        # decoding in plain words.
        self._is_stateful = any(kind != "full_attention" for kind in config.layer_types)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()


@dataclass
class FarspanModelOutput(BaseModelOutputWithPast):
    """Hidden states, cache, and what the feed-forwards report beside their output.

    `auxiliary` has one record (or None) per layer, `aux_loss` the sum of their losses; both are None when there is
    nothing, as outside of training mode.
    """

    aux_loss: Tensor | None = None
    auxiliary: tuple[AuxiliaryRecord | None, ...] | None = None


@dataclass
class FarspanCausalLMOutput(CausalLMOutputWithPast):
    """Loss, logits, cache and hidden states; `aux_loss` is already part of `loss`. `auxiliary` as in the stack's."""

    aux_loss: Tensor | None = None
    auxiliary: tuple[AuxiliaryRecord | None, ...] | None = None


class FarspanModel(FarspanPreTrainedModel):
    """The stack without a head."""

    def __init__(self, config: FarspanConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(FarspanBlock(config, i) for i in range(len(config.mixers)))
        self.norm = make_norm(config.norm_type, config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def new_cache(self, context_length: int | None = None) -> FarspanCache:
        """An empty cache; `context_length` fixes the length that scaled positions plan for."""
        return FarspanCache([block.mixer.new_cache() for block in self.blocks], context_length)

    @property
    def blocks(self) -> list[FarspanBlock]:
        """The layers, typed."""
        return [layer for layer in self.layers if isinstance(layer, FarspanBlock)]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FarspanCache | None = None,
        inputs_embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        context_length: int | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> FarspanModelOutput | tuple:
        """Runs the stack; see `FarspanForCausalLM.forward` for the arguments."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ShapeError("Give exactly one of input_ids [B, T] and inputs_embeds [B, T, D].")
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ConfigError(
                "output_attentions=True: Farspan returns no attention weights. State-based mixers have none, and "
                "softmax runs in fused kernels that do not form them; leave output_attentions out."
            )
        if input_ids is not None and (input_ids.dim() != 2 or input_ids.is_floating_point()):
            raise ShapeError(f"input_ids is {input_ids.dtype} of shape {list(input_ids.shape)}; expected int64 [B, T].")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if x.dim() != 3 or x.shape[-1] != self.config.hidden_size:
            raise ShapeError(f"inputs_embeds has shape {list(x.shape)}; expected [B, T, D={self.config.hidden_size}].")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if past_key_values is None and use_cache and not self.training and cu_seqlens is None and self.config.causal:
            past_key_values = self.new_cache(context_length)
        layout = self._layout(x, attention_mask, position_ids, cu_seqlens, past_key_values, context_length)

        keep_all = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = [x] if keep_all else None
        records: list[AuxiliaryRecord | None] = []
        for i, layer in enumerate(self.layers):
            x, aux = layer(x, layout=layout, cache=None if past_key_values is None else past_key_values.layers[i])
            records.append(aux)
            if states is not None and i + 1 < len(self.layers):
                states.append(x)
        x = self.norm(x)
        if states is not None:
            states.append(x)
        if past_key_values is not None:
            past_key_values.advance(x.shape[1], _next_positions(layout, past_key_values))
        losses = [record.loss for record in records if record is not None and record.loss is not None]
        output = FarspanModelOutput(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=None if states is None else tuple(states),
            aux_loss=torch.stack(losses).sum() if losses else None,
            auxiliary=tuple(records) if any(records) else None,
        )
        return output if return_dict is not False else output.to_tuple()

    def _layout(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: FarspanCache | None,
        context_length: int | None,
    ) -> SequenceLayout:
        rows, length = x.shape[:2]
        if cache is not None and not isinstance(cache, FarspanCache):
            raise ConfigError(f"past_key_values is a {type(cache).__name__}; Farspan needs model.new_cache().")
        if cache is not None and not self.config.causal:
            raise ConfigError("past_key_values needs causal=true: a model that looks both ways has no past to keep.")
        if cache is not None and len(cache.layers) != len(self.layers):
            raise ShapeError(f"past_key_values has {len(cache.layers)} layers, the model {len(self.layers)}.")
        seen = 0 if cache is None else cache.tokens_seen
        if cache is not None and cache.batch_size not in (-1, rows):
            raise ShapeError(f"past_key_values holds {cache.batch_size} rows, the input has {rows}.")
        mask = _padding_mask(attention_mask, rows, length, seen)
        if position_ids is None:
            positions = positions_of(mask, (rows, length), cache, x.device)
        else:
            accepted = ((length,), (1, length), (rows, length))
            if tuple(position_ids.shape) not in accepted or position_ids.is_floating_point():
                raise ShapeError(
                    f"position_ids is {position_ids.dtype} of shape {list(position_ids.shape)}; expected integers "
                    f"[B={rows}, T={length}]."
                )
            positions = position_ids.to(x.device).reshape(-1, length).expand(rows, -1)
        if cu_seqlens is None and position_ids is not None and mask is None and rows == 1 and seen == 0 and length > 1:
            cu_seqlens = _documents(positions)
        if cu_seqlens is not None:
            if mask is not None or seen:
                raise ShapeError(
                    "cu_seqlens describes packed documents; it excludes attention_mask and a filled cache."
                )
            if rows != 1:
                raise ShapeError(
                    f"cu_seqlens needs batch 1, the input has {rows} rows; lay them end to end in one row."
                )
            varlen.check_cu_seqlens(cu_seqlens, length)
            if position_ids is None:
                positions = varlen.position_ids(cu_seqlens).reshape(1, -1)
        if cache is not None:
            cache.context_length = cache.context_length or context_length or seen + length
            context_length = cache.context_length
        return SequenceLayout(positions, mask, cu_seqlens, context_length)


class FarspanForCausalLM(FarspanPreTrainedModel, GenerationMixin):
    """A language model: the stack and a linear head that predicts the next token.

    Example:
        >>> import torch
        >>> config = FarspanConfig(vocab_size=64, hidden_size=32, num_attention_heads=2, mixers=["metala", "softmax"])
        >>> model = FarspanForCausalLM(config)
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 64])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - the base class reads a dict
    # transformers then hands num_items_in_batch to forward.
    accepts_loss_kwargs = True

    def __init__(self, config: FarspanConfig) -> None:
        super().__init__(config)
        self.model = FarspanModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def new_cache(self, context_length: int | None = None) -> FarspanCache:
        """An empty cache; `context_length` fixes the length that scaled positions plan for."""
        return self.model.new_cache(context_length)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FarspanCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        context_length: int | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_logits: bool = True,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        **more: Any,
    ) -> FarspanCausalLMOutput | tuple:
        """Logits of the next token and, with labels, the mean cross entropy.

        Args:
            input_ids: `[B, T]` int64.
            attention_mask: `[B, T]`, 1 for real tokens, or `[B, past + T]` as transformers passes it while decoding
                (the cache remembers the past's). Padding may stand anywhere and changes nothing.
            position_ids: `[B, T]`; None counts the real tokens of each row, continuing behind the cache. In a single
                row without mask or cache, restarts mark packed documents.
            past_key_values: a cache from `new_cache()` or an earlier call; updated in place.
            inputs_embeds: `[B, T, D]` instead of `input_ids`.
            labels: `[B, T]`, shifted inside as in transformers: position t is scored against `labels[t + 1]`, except at
                the end of a packed document given by `cu_seqlens`. −100 is ignored.
            cu_seqlens: `[num_seqs + 1]` int32 boundaries of documents packed in one row.
            context_length: the length that scaled positions plan for; None takes the cache's (which keeps that of its
                first call), or this call's largest position + 1.
            use_cache: whether to return a cache (never in training mode unless one is passed).
            output_hidden_states: whether to return the input of each layer and the final state.
            output_attentions: True is refused: there are no attention weights to return.
            output_logits: False leaves the logits out; the loss is then computed in chunks that never hold them all.
            logits_to_keep: number of last positions to form logits for (0 is all), or an index tensor.
            num_items_in_batch: divisor of the loss instead of the number of scored labels (gradient accumulation).
            return_dict: False returns a tuple.
            more: `shift_labels`, `[B, T]`, already aligned: position t is scored against `shift_labels[t]`; instead of
                `labels`. What tokenizers and collators add for other models (`token_type_ids` and the like) is
                ignored, any other name refused.

        Returns:
            `FarspanCausalLMOutput`.

        Raises:
            ShapeError: for inputs that do not fit each other.
            ConfigError: for `output_attentions=True` and for caches of other classes.
        """
        # Not a named argument: the Trainer takes every argument called label for a column that evaluation needs.
        shift_labels = more.pop("shift_labels", None)
        for name in more:
            if name not in _IGNORED_ARGUMENTS:
                accepted = [*inspect.signature(self.forward).parameters, "shift_labels"]
                raise ConfigError(f"forward() has no argument {name!r}: {nearest(name, accepted)}")
        if labels is not None and shift_labels is not None:
            raise ShapeError("Give labels (shifted inside) or shift_labels (already aligned), not both.")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            cu_seqlens=cu_seqlens,
            context_length=context_length,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        hidden = outputs.last_hidden_state
        loss = None
        if labels is not None or shift_labels is not None:
            if shift_labels is None:
                assert labels is not None
                shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)
                if cu_seqlens is not None:
                    ends = cu_seqlens[1:].long() - 1
                    shift_labels[..., ends[ends >= 0]] = IGNORE_INDEX
            loss = chunked_cross_entropy(
                hidden, self.lm_head.weight, shift_labels.to(hidden.device), num_items=num_items_in_batch
            )
            if outputs.aux_loss is not None:
                # Of several micro-batches each has the weight of its labels, so that their sum is one batch's loss.
                share = 1 if num_items_in_batch is None else (shift_labels != IGNORE_INDEX).sum() / num_items_in_batch
                loss = loss + share * outputs.aux_loss
        logits = None
        if output_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept] if logits_to_keep is not None else hidden)
        output = FarspanCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            aux_loss=outputs.aux_loss,
            auxiliary=outputs.auxiliary,
        )
        return output if return_dict is not False else output.to_tuple()

    def flops_per_token(self, length: int) -> float:
        """Forward operations per token (2 per multiply-add), averaged over a causal sequence of `length` tokens.

        Counts mixers, feed-forwards and the head; a training step costs about three times as much, four times with
        activation checkpointing.
        """
        layers = sum(
            block.mixer.flops_per_token(length) + block.feed_forward.flops_per_token() for block in self.model.blocks
        )
        return layers + 2.0 * self.config.hidden_size * self.config.vocab_size

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *unused: Any, **also_unused: Any
    ) -> None:
        """Called by `generate`: supplies our cache and one context length for the whole generation."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ConfigError(
                f"cache_implementation={generation_config.cache_implementation!r} is not for Farspan models, whose "
                "layers bring their own caches; leave it out."
            )
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            length = model_kwargs.setdefault("context_length", generation_config.max_length)
            if generation_config.use_cache is not False:
                model_kwargs["past_key_values"] = self.new_cache(length)
        else:
            if not isinstance(cache, FarspanCache):
                raise ConfigError(f"past_key_values is a {type(cache).__name__}; Farspan needs model.new_cache().")
            cache._is_user_defined = True
            model_kwargs["context_length"] = cache.context_length


def _padding_mask(attention_mask: Tensor | None, rows: int, length: int, seen: int) -> Tensor | None:
    """The new tokens' part of a mask as bool, or None when all are real."""
    if attention_mask is None:
        return None
    if (
        attention_mask.dim() != 2
        or attention_mask.shape[0] != rows
        or attention_mask.shape[1] not in (length, seen + length)
    ):
        raise ShapeError(
            f"attention_mask has shape {list(attention_mask.shape)}; expected [B={rows}, T={length}]"
            + (f" or [B={rows}, past + T={seen + length}]." if seen else ".")
        )
    mask = attention_mask[:, -length:].bool() if length else attention_mask[:, :0].bool()
    unusual = attention_mask.is_floating_point() and not torch.compiler.is_compiling()
    if unusual and not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ShapeError("attention_mask holds other values than 0 and 1; give 1 for real tokens, 0 for padding.")
    # Without padding the fast paths apply; under torch.compile the question would break the graph.
    return None if not torch.compiler.is_compiling() and bool(mask.all()) else mask


@torch.compiler.disable
def _documents(positions: Tensor) -> Tensor | None:
    """Boundaries where the positions of a single row restart, or None when they never do."""
    return None if bool((positions[0, 1:] > positions[0, :-1]).all()) else varlen.from_position_ids(positions)


def _next_positions(layout: SequenceLayout, cache: FarspanCache) -> Tensor:
    """Each row's position after its newest real token."""
    positions = layout.positions
    if layout.padding_mask is not None:
        positions = positions.masked_fill(~layout.padding_mask, -1)
    following = positions.amax(-1) + 1 if positions.shape[1] else positions.new_zeros(len(positions))
    return following if cache.next_positions is None else torch.maximum(following, cache.next_positions)
