"""The language model: the stack and a head that predicts the next token."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from farspan.errors import ConfigError
from farspan.models.cache import FarspanCache, positions_of
from farspan.models.configuration import FarspanConfig
from farspan.models.inputs import refuse_unknown
from farspan.models.modeling import FarspanModel, FarspanPreTrainedModel
from farspan.nn.feed_forward import AuxiliaryRecord
from farspan.nn.losses import IGNORE_INDEX, head_cross_entropy, scored_share


@dataclass
class FarspanCausalLMOutput(CausalLMOutputWithPast):
    """Loss, logits, cache, hidden states and attentions; `aux_loss` is already part of `loss`, `auxiliary` as in the
    stack's.
    """

    aux_loss: Tensor | None = None
    auxiliary: tuple[AuxiliaryRecord | None, ...] | None = None


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
        if not config.causal:
            raise ConfigError(
                "causal=False lets every position see the token that it would predict; FarspanForCausalLM needs "
                "causal=True. For a model that looks both ways take FarspanForMaskedLM."
            )
        if config.vocab_size == 0:
            raise ConfigError("vocab_size=0 has no tokens to predict; FarspanForCausalLM needs a vocabulary.")
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
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
        token_type_ids: Tensor | None = None,
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
            past_key_values: a cache from `new_cache()` or an earlier call; updated in place. Gradients reach the new
                tokens, not what it holds.
            inputs_embeds: `[B, T, D]` instead of `input_ids`.
            token_type_ids: `[B, T]`, of models with `type_vocab_size`; others ignore it. None is type 0.
            labels: `[B, T]`, shifted inside as in transformers: position t is scored against `labels[t + 1]`, except at
                the end of a packed document given by `cu_seqlens`. −100 is ignored.
            cu_seqlens: `[num_seqs + 1]` int32 boundaries of documents packed in one row.
            context_length: the length that scaled positions plan for; None takes the cache's (which keeps that of its
                first call), or this call's largest position + 1.
            use_cache: whether to return a cache (never in training mode unless one is passed).
            output_hidden_states: whether to return the input of each layer and the final state.
            output_attentions: whether to return the weights `[B, H, T, S]` of every layer whose mixer has them
                (softmax, collinear, dynamic mask, dilated); costs O(T·S²) per head. Evicting caches know no places to
                report weights for; use `use_cache=False` with them. Refused where no layer has weights.
            output_logits: False leaves the logits out; the loss is then computed in chunks that never hold them all.
            logits_to_keep: number of last positions to form logits for (0 is all), or an index tensor.
            num_items_in_batch: divisor of the loss instead of the number of scored labels (gradient accumulation).
            return_dict: False returns a tuple.
            more: `shift_labels`, `[B, T]`, already aligned: position t is scored against `shift_labels[t]`; they
                replace `labels`. What tokenizers and collators add for other models (`special_tokens_mask` and the
                like) is ignored, any other name refused.

        Returns:
            `FarspanCausalLMOutput`.

        Raises:
            ShapeError: for inputs that do not fit each other.
            ConfigError: for attention weights that do not exist and for caches of other classes.
        """
        # Not a named argument: the Trainer takes every argument called label for a column that evaluation needs.
        shift_labels = more.pop("shift_labels", None)
        refuse_unknown(self.forward, more, also=("shift_labels",))
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
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
            loss = head_cross_entropy(hidden, self.lm_head, shift_labels.to(hidden.device), num_items_in_batch)
            if outputs.aux_loss is not None:
                loss = loss + scored_share(shift_labels, num_items_in_batch) * outputs.aux_loss
        logits = None
        if output_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept] if logits_to_keep is not None else hidden)
        output = FarspanCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            aux_loss=outputs.aux_loss,
            auxiliary=outputs.auxiliary,
        )
        return output if return_dict is not False else output.to_tuple()

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """Called by `generate`, which counts on from the prompt's last place: padding behind a text counts nothing."""
        mask = model_kwargs.get("attention_mask")
        if mask is None:
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        return positions_of(mask, tuple(mask.shape), None, mask.device)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Asked by transformers before it would make a cache of its own."""
        return False

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
