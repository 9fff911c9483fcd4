"""The one stack: embeddings, blocks of mixer and feed-forward, final norm. Heads stand beside it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from farspan.errors import ConfigError, ShapeError
from farspan.mixers.layout import SequenceLayout
from farspan.models.blocks import INITIAL_SCALE, FarspanBlock
from farspan.models.cache import FarspanCache
from farspan.models.configuration import FarspanConfig
from farspan.models.inputs import check_cache, check_table, layout_of, next_positions, refuse_unknown
from farspan.models.pooling import pool
from farspan.nn.experts.balance import auxiliary_loss
from farspan.nn.feed_forward import AuxiliaryRecord
from farspan.nn.norms import make_norm


class FarspanPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving, shared by all Farspan models."""

    config: FarspanConfig
    config_class = FarspanConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("FarspanBlock",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    # Of the class: a configuration may be. Each model says what its own layers are.
    _is_stateful = True

    def __init__(self, config: FarspanConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        # A state cannot be rolled back, nor can a window that has evicted keys: transformers then refuses assisted
        # decoding in plain words.
        self._is_stateful = any(kind != "full_attention" for kind in config.layer_types)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range * getattr(module, INITIAL_SCALE, 1.0))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()

    def flops_per_token(self, length: int) -> float:
        """Forward operations per token (2 per multiply-add), averaged over a sequence of `length` tokens.

        Counts mixers, feed-forwards and a head over the vocabulary; a training step costs about three times as much,
        four times with activation checkpointing.
        """
        blocks = [module for module in self.modules() if isinstance(module, FarspanBlock)]
        layers = sum(block.mixer.flops_per_token(length) + block.feed_forward.flops_per_token() for block in blocks)
        head = getattr(self, "lm_head", None)
        return layers + (2.0 * head.weight.numel() if isinstance(head, nn.Linear) else 0.0)


@dataclass
class FarspanModelOutput(BaseModelOutputWithPast):
    """Hidden states, cache, and what the feed-forwards report beside their output.

    `pooler_output` is `[B, D]` (`[num_seqs, D]` where documents are packed) with `config.pooler`, else None.
    `auxiliary` has one record (or None) per layer, `aux_loss` the sum of their losses and of those that are
    pooled over the layers; both are None when there is nothing, as outside of training mode.
    """

    pooler_output: Tensor | None = None
    aux_loss: Tensor | None = None
    auxiliary: tuple[AuxiliaryRecord | None, ...] | None = None


class FarspanModel(FarspanPreTrainedModel):
    """The stack without a head.

    Embeddings: x = dropout(N(s · tokens + types + positions)), the parts that the config names.
    """

    def __init__(self, config: FarspanConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width) if config.vocab_size else None
        self.embed_positions = (
            nn.Embedding(config.max_position_embeddings + config.position_embedding_offset, width)
            if config.position_embedding == "learned"
            else None
        )
        self.embed_token_types = nn.Embedding(config.type_vocab_size, width) if config.type_vocab_size else None
        self.embed_norm = (
            make_norm(config.norm_type, width, config.norm_eps) if config.embedding_norm else nn.Identity()
        )
        self.embed_dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(FarspanBlock(config, i) for i in range(len(config.mixers)))
        self.norm = make_norm(config.norm_type, width, config.norm_eps) if config.final_norm else nn.Identity()
        self.pooler = nn.Linear(width, width) if config.pooler else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding | None:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def new_cache(self, context_length: int | None = None) -> FarspanCache:
        """An empty cache; `context_length` fixes the length that scaled positions plan for."""
        return FarspanCache([block.mixer.new_cache() for block in self.blocks], context_length, self.config.mixers)

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
        token_type_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        context_length: int | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **more: Any,
    ) -> FarspanModelOutput | tuple:
        """Runs the stack; see `FarspanForCausalLM.forward` for the arguments."""
        refuse_unknown(self.forward, more)
        observe = self.config.output_attentions if output_attentions is None else output_attentions
        if observe and not any(block.mixer.attention_weights for block in self.blocks):
            raise ConfigError(
                f"output_attentions=True: the mixers of this model ({', '.join(dict.fromkeys(self.config.mixers))}) "
                "have no attention weights; leave it out."
            )
        x = self._tokens(input_ids, inputs_embeds)
        rows, length = x.shape[:2]
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
            if past_key_values is not None and torch.is_grad_enabled():
                raise ConfigError(
                    "past_key_values does not go with gradient checkpointing, which reads the same tokens twice; leave "
                    "one of them out."
                )
        if past_key_values is None and use_cache and not self.training and cu_seqlens is None and self.config.causal:
            past_key_values = self.new_cache(context_length)
        check_cache(past_key_values, self.config.mixers, rows, self.config.causal)
        layout = layout_of(
            (rows, length),
            x.device,
            attention_mask,
            position_ids,
            cu_seqlens,
            past_key_values,
            context_length,
            compact=self.config.causal
            and (past_key_values is None or all(block.mixer.compact_cache for block in self.blocks)),
        )
        if observe:
            layout.attentions = []
        seen = 0 if past_key_values is None else past_key_values.tokens_seen
        x = self._embed(x, token_type_ids, layout, seen + length if position_ids is None else None)

        keep_all = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = [x] if keep_all else None
        if past_key_values is not None:
            past_key_values.begin()
        records: list[AuxiliaryRecord | None] = []
        for i, layer in enumerate(self.layers):
            x, aux = layer(x, layout=layout, cache=None if past_key_values is None else past_key_values.layers[i])
            records.append(aux)
            if states is not None and i + 1 < len(self.layers):
                states.append(x)
        if observe and len(layout.attentions or ()) != sum(block.mixer.attention_weights for block in self.blocks):
            raise ConfigError(
                "output_attentions=True: a layer's cache has evicted keys and knows no places to report weights for; "
                "use use_cache=False, or leave output_attentions out."
            )
        x = self.norm(x)
        if states is not None:
            states.append(x)
        if past_key_values is not None:
            past_key_values.advance(length, next_positions(layout, past_key_values))
        output = FarspanModelOutput(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=None if states is None else tuple(states),
            attentions=None if layout.attentions is None else tuple(layout.attentions),
            pooler_output=None if self.pooler is None else self.pooler(pool(x, layout, "first")).tanh(),
            aux_loss=auxiliary_loss(records),
            auxiliary=tuple(records) if any(records) else None,
        )
        return output if return_dict is not False else output.to_tuple()

    def _tokens(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        width = self.config.hidden_size
        if (input_ids is None) == (inputs_embeds is None):
            raise ShapeError("Give exactly one of input_ids [B, T] and inputs_embeds [B, T, D].")
        if inputs_embeds is not None:
            if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != width:
                raise ShapeError(f"inputs_embeds has shape {list(inputs_embeds.shape)}; expected [B, T, D={width}].")
            return inputs_embeds
        assert input_ids is not None
        if self.embed_tokens is None:
            raise ConfigError("This model has no token embeddings (vocab_size=0); give inputs_embeds [B, T, D].")
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ShapeError(f"input_ids is {input_ids.dtype} of shape {list(input_ids.shape)}; expected int64 [B, T].")
        return self.embed_tokens(input_ids)

    def _embed(self, x: Tensor, token_type_ids: Tensor | None, layout: SequenceLayout, reach: int | None) -> Tensor:
        """What is added to the embeddings of tokens; all positions are known to lie below `reach`, if it is given."""
        if self.config.embedding_scale != 1:
            x = x * self.config.embedding_scale
        if self.embed_token_types is not None:
            if token_type_ids is None:
                token_type_ids = layout.positions.new_zeros(())
            elif token_type_ids.shape != x.shape[:2]:
                raise ShapeError(
                    f"token_type_ids has shape {list(token_type_ids.shape)}; expected [B={len(x)}, T={x.shape[1]}]."
                )
            x = x + self.embed_token_types(token_type_ids)
        if self.embed_positions is not None:
            check_table(layout, reach, self.config.max_position_embeddings)
            x = x + self.embed_positions(layout.positions + self.config.position_embedding_offset)
        return self.embed_dropout(self.embed_norm(x))
