"""Heads that read a whole text: hidden tokens, the class of a text, the class of each token."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils import ModelOutput

from farspan.errors import ConfigError, ShapeError
from farspan.models.configuration import FarspanConfig, ProblemType
from farspan.models.inputs import layout_of, refuse_unknown
from farspan.models.modeling import FarspanModel, FarspanModelOutput, FarspanPreTrainedModel
from farspan.models.pooling import pool
from farspan.nn.feed_forward import AuxiliaryRecord, activation
from farspan.nn.losses import IGNORE_INDEX, classification_loss, head_cross_entropy, scored_share
from farspan.nn.norms import make_norm


@dataclass
class FarspanMaskedLMOutput(MaskedLMOutput):
    """Losses, logits and hidden states.

    `loss` is the sum of `mlm_loss`, `nsp_loss` and `aux_loss`, those that there are. `seq_relationship_logits` is
    `[B, 2]` (`[num_seqs, 2]` where documents are packed) with `config.next_sentence_head`, else None. `auxiliary` as in
    the stack's output.
    """

    seq_relationship_logits: Tensor | None = None
    mlm_loss: Tensor | None = None
    nsp_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    auxiliary: tuple[AuxiliaryRecord | None, ...] | None = None


@dataclass
class FarspanSequenceClassifierOutput(SequenceClassifierOutput):
    """Loss, logits and hidden states; `aux_loss` is already part of `loss`. `auxiliary` as in the stack's."""

    aux_loss: Tensor | None = None
    auxiliary: tuple[AuxiliaryRecord | None, ...] | None = None


@dataclass
class FarspanTokenClassifierOutput(TokenClassifierOutput):
    """Loss, logits and hidden states; `aux_loss` is already part of `loss`. `auxiliary` as in the stack's."""

    aux_loss: Tensor | None = None
    auxiliary: tuple[AuxiliaryRecord | None, ...] | None = None


class PredictionTransform(nn.Module):
    """y = N(act(x W + b)): what BERT puts between the stack and the head that predicts tokens."""

    def __init__(self, config: FarspanConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = activation(config.hidden_act)
        self.norm = make_norm(config.norm_type, config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.activation(self.dense(x)))


class FarspanForMaskedLM(FarspanPreTrainedModel):
    """A masked language model: the stack, BERT's transform and a linear head that predicts the token at each place.

    With `config.next_sentence_head` a second head tells from the pooler whether two sentences follow one another.

    Example:
        >>> import torch
        >>> config = FarspanConfig(
        ...     vocab_size=64, hidden_size=32, num_attention_heads=2, mixers=["cosine", "softmax"], causal=False
        ... )
        >>> model = FarspanForMaskedLM(config)
        >>> model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[-100, 5, -100]])).logits.shape
        torch.Size([1, 3, 64])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - the base class reads a dict
    # transformers then hands num_items_in_batch to forward.
    accepts_loss_kwargs = True

    def __init__(self, config: FarspanConfig) -> None:
        super().__init__(config)
        if config.vocab_size == 0:
            raise ConfigError("vocab_size=0 has no tokens to predict; FarspanForMaskedLM needs a vocabulary.")
        self.model = FarspanModel(config)
        self.transform = PredictionTransform(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.next_sentence_head = nn.Linear(config.hidden_size, 2) if config.next_sentence_head else None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        context_length: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_logits: bool = True,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        **more: Any,
    ) -> FarspanMaskedLMOutput | tuple:
        """Logits of the token at each place and, with labels, the mean cross entropy of those that are scored.

        Args:
            input_ids: `[B, T]` int64.
            attention_mask: `[B, T]`, 1 for real tokens; padding may stand anywhere.
            token_type_ids: `[B, T]`, of models with `type_vocab_size`; others ignore it. None is type 0.
            position_ids: `[B, T]`; None counts the real tokens of each row. In a single row without mask, restarts mark
                packed documents.
            inputs_embeds: `[B, T, D]` instead of `input_ids`.
            labels: `[B, T]`, not shifted: position t is scored against `labels[t]`; −100 is ignored.
            next_sentence_label: `[B]`, 0 where the second sentence follows the first, 1 where it does not.
            cu_seqlens: `[num_seqs + 1]` int32 boundaries of documents packed in one row.
            context_length: the length that scaled positions plan for; None is this call's largest position + 1.
            output_hidden_states: whether to return the input of each layer and the final state.
            output_attentions: as in `FarspanForCausalLM`.
            output_logits: False leaves the logits out; transform and head then run on scored places alone, and the loss
                is computed in chunks that never hold all their logits.
            num_items_in_batch: divisor of the loss instead of the number of scored labels (gradient accumulation).
            return_dict: False returns a tuple.
            more: what tokenizers and collators add for other models (`special_tokens_mask` and the like) is ignored,
                any other name refused.

        Returns:
            `FarspanMaskedLMOutput`.

        Raises:
            ShapeError: for inputs that do not fit each other.
            ConfigError: for attention weights that do not exist, and for `next_sentence_label` without such a head.
        """
        refuse_unknown(self.forward, more)
        if next_sentence_label is not None and self.next_sentence_head is None:
            raise ConfigError("next_sentence_label needs next_sentence_head=true in the configuration.")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            cu_seqlens=cu_seqlens,
            context_length=context_length,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        hidden = outputs.last_hidden_state
        losses: dict[str, Tensor] = {}
        logits = relation = None
        share: Tensor | float = 1.0
        states = self.transform(hidden) if output_logits else hidden
        if output_logits:
            logits = self.lm_head(states)
        if labels is not None:
            labels = labels.to(hidden.device)
            share = scored_share(labels, num_items_in_batch)
            states, scored = _scored(states, labels)
            states = states if output_logits else self.transform(states)
            losses["mlm_loss"] = head_cross_entropy(states, self.lm_head, scored, num_items_in_batch)
        if self.next_sentence_head is not None:
            relation = self.next_sentence_head(outputs.pooler_output)
            if next_sentence_label is not None:
                targets = next_sentence_label.to(relation.device)
                losses["nsp_loss"] = share * classification_loss(relation, targets, "single_label_classification")
        if losses and outputs.aux_loss is not None:
            losses["aux_loss"] = share * outputs.aux_loss
        output = FarspanMaskedLMOutput(
            loss=torch.stack([*losses.values()]).sum() if losses else None,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            seq_relationship_logits=relation,
            mlm_loss=losses.get("mlm_loss"),
            nsp_loss=losses.get("nsp_loss"),
            aux_loss=outputs.aux_loss,
            auxiliary=outputs.auxiliary,
        )
        return output if return_dict is not False else output.to_tuple()


def _scored(states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The states that have a label, and these labels; all of them under torch.compile, which needs fixed shapes."""
    if labels.shape != states.shape[:-1]:
        raise ShapeError(
            f"labels have shape {list(labels.shape)}; expected [B={states.shape[0]}, T={states.shape[1]}]."
        )
    if torch.compiler.is_compiling():
        return states, labels
    kept = labels != IGNORE_INDEX
    return states[kept], labels[kept]


class Classifier(FarspanPreTrainedModel):
    """The stack, dropout and a linear map to `config.num_labels` numbers; 0 labels leave the states as they are.

    `config.problem_type` says what is learnt: `single_label_classification`, `multi_label_classification` or
    `regression`; None is decided and remembered at the first labels, as in transformers: regression for one label, else
    single label for integers, multi-label for floats.
    """

    # transformers then hands num_items_in_batch to forward.
    accepts_loss_kwargs = True

    def __init__(self, config: FarspanConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = FarspanModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier: nn.Module = nn.Identity()
        if config.num_labels:
            self.classifier = nn.Linear(config.hidden_size, config.num_labels, bias=config.classifier_bias)
        self.post_init()

    def classify(
        self,
        outputs: FarspanModelOutput,
        states: Tensor,
        labels: Tensor | None,
        num_items_in_batch: int | Tensor | None,
        return_dict: bool | None,
    ) -> ModelOutput | tuple:
        """Logits of `states` `[..., D]` and, with labels, the loss; the stack's `outputs` supply the rest."""
        logits = self.classifier(self.dropout(states))
        loss = None
        if labels is not None:
            if not self.num_labels:
                raise ConfigError("num_labels=0 has no classes to learn; set num_labels, or leave the labels out.")
            labels = labels.to(logits.device)
            problem = self.problem_type(labels)
            loss = classification_loss(logits, labels, problem, num_items_in_batch)
            if self.only_problem_type is None and self.config.problem_type is None:
                self.config.problem_type = problem  # not before the labels have proved to fit
            if outputs.aux_loss is not None:
                loss = loss + scored_share(labels, num_items_in_batch) * outputs.aux_loss
        output = self.output_class(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            aux_loss=outputs.aux_loss,
            auxiliary=outputs.auxiliary,
        )
        return output if return_dict is not False else output.to_tuple()

    output_class: type[ModelOutput]
    only_problem_type: ProblemType | None = None  # of heads that learn one thing, whatever the configuration says

    def problem_type(self, labels: Tensor) -> ProblemType:
        """What is learnt."""
        known = self.only_problem_type or self.config.problem_type
        floats = labels.is_floating_point()
        several: ProblemType = "multi_label_classification" if floats else "single_label_classification"
        return known or ("regression" if self.num_labels == 1 else several)


class _TextClassifier(Classifier):
    """The forward pass of classifiers of texts and of tokens."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        context_length: int | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        **more: Any,
    ) -> ModelOutput | tuple:
        """Logits and, with labels, the mean loss.

        Args:
            input_ids: `[B, T]` int64.
            attention_mask: `[B, T]`, 1 for real tokens; padding may stand anywhere.
            token_type_ids: `[B, T]`, of models with `type_vocab_size`; others ignore it. None is type 0.
            position_ids: `[B, T]`; None counts the real tokens of each row. In a single row without mask, restarts mark
                packed documents.
            inputs_embeds: `[B, T, D]` instead of `input_ids`.
            labels: see `farspan.nn.losses.classification_loss`; of texts, or of tokens.
            cu_seqlens: `[num_seqs + 1]` int32 boundaries of documents packed in one row; each is a text.
            context_length: the length that scaled positions plan for; None is this call's largest position + 1.
            use_cache: without effect; a classifier reads its input once.
            output_hidden_states: whether to return the input of each layer and the final state.
            output_attentions: as in `FarspanForCausalLM`.
            num_items_in_batch: divisor of the loss instead of the number of scored labels (gradient accumulation).
            return_dict: False returns a tuple.
            more: what tokenizers and collators add for other models (`special_tokens_mask` and the like) is ignored,
                any other name refused.

        Returns:
            `FarspanSequenceClassifierOutput` or `FarspanTokenClassifierOutput`.

        Raises:
            ShapeError: for inputs that do not fit each other.
            ConfigError: for attention weights that do not exist.
        """
        refuse_unknown(self.forward, more)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            cu_seqlens=cu_seqlens,
            context_length=context_length,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        states = self._states(outputs, attention_mask, position_ids, cu_seqlens)
        return self.classify(outputs, states, labels, num_items_in_batch, return_dict)

    def _states(
        self,
        outputs: FarspanModelOutput,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        """What is classified: `[..., D]`."""
        raise NotImplementedError


class FarspanForSequenceClassification(_TextClassifier):
    """The class of a text, several labels of it, or numbers: a linear map of one state per text.

    `config.classifier_pooling` says which state: of the `last` or `first` real token, their `mean`, or the `pooler`'s;
    `config.problem_type` what is learnt (see `Classifier`). Documents packed in one row are one text each.

    Example:
        >>> import torch
        >>> config = FarspanConfig(
        ...     vocab_size=64, hidden_size=32, num_attention_heads=2, mixers=["metala", "softmax"], num_labels=3
        ... )
        >>> model = FarspanForSequenceClassification(config)
        >>> model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([2])).logits.shape
        torch.Size([1, 3])
    """

    output_class = FarspanSequenceClassifierOutput

    def _states(
        self,
        outputs: FarspanModelOutput,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        how = self.config.classifier_pooling
        if how == "pooler":
            assert outputs.pooler_output is not None
            return outputs.pooler_output
        hidden = outputs.last_hidden_state
        assert hidden is not None and how is not None
        shape = (hidden.shape[0], hidden.shape[1])
        return pool(hidden, layout_of(shape, hidden.device, attention_mask, position_ids, cu_seqlens, None, None), how)


class FarspanForTokenClassification(_TextClassifier):
    """The class of every token: a linear map of each final state; labels `[B, T]` are not shifted, −100 is ignored.

    Example:
        >>> import torch
        >>> config = FarspanConfig(
        ...     vocab_size=64, hidden_size=32, num_attention_heads=2, mixers=["cosine"], causal=False, num_labels=5
        ... )
        >>> model = FarspanForTokenClassification(config)
        >>> model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[-100, 4, 0]])).logits.shape
        torch.Size([1, 3, 5])
    """

    output_class = FarspanTokenClassifierOutput
    only_problem_type = "single_label_classification"

    def _states(
        self,
        outputs: FarspanModelOutput,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        assert outputs.last_hidden_state is not None
        return outputs.last_hidden_state
