"""Shared-expert isolated mixture of experts: a few MLPs per token by softmax routing, beside one for all tokens."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from farspan.errors import ConfigError
from farspan.nn.experts.balance import balance_record, token_shares
from farspan.nn.experts.retrieval import check_coefficient
from farspan.nn.feed_forward import MLP, AuxiliaryRecord, FeedForward, FeedForwardShape, MLPOptions


@dataclass
class SEIMoEOptions(MLPOptions):
    """Options of `seimoe`: those of its MLPs, and of the routing.

    Attributes:
        intermediate_size: inner width of every expert and of the shared one; None takes the model's.
        hidden_act: activation; None takes the model's `hidden_act`.
        bias: whether the projections have biases (released: yes).
        num_experts: number of routed experts E.
        num_experts_per_tok: experts k that each token is sent to.
        norm_topk_prob: whether the k weights are divided by their sum (released: no).
        router_aux_loss_coef: factor of this layer's load-balancing loss in training; released without one.
    """

    bias: bool = True
    num_experts: int = 8
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = False
    router_aux_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok={self.num_experts_per_tok} must lie between 1 and num_experts={self.num_experts}."
            )
        check_coefficient(self.router_aux_loss_coef)


class SEIMoE(FeedForward):
    """y = sigmoid(x w_s) · MLP_shared(x) + sum over the k most probable experts e of p_e · MLP_e(x), p = softmax(x W).

    No token is dropped and no expert has a capacity. Of equally probable experts the one with the smaller index wins.

    Cost: 4·D·F·(k + 1) operations a token; 2·D·F·(E + 1) parameters.
    Source: LoserCheems/WonderfulMatrices: modules/seimoe.py.
    """

    reads_padding: ClassVar[bool] = True

    def __init__(self, config: FeedForwardShape, options: SEIMoEOptions) -> None:
        super().__init__()
        self.options = options
        self.router = nn.Linear(config.hidden_size, options.num_experts, bias=False)
        self.experts = nn.ModuleList(MLP(config, options) for _ in range(options.num_experts))
        self.shared_expert = MLP(config, options)
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, AuxiliaryRecord | None]:
        tokens, k = x.flatten(0, -2), self.options.num_experts_per_tok
        logits = self.router(tokens)
        log_probability = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
        probability = log_probability.exp()
        expert_ids = probability.detach().sort(dim=-1, descending=True, stable=True).indices[:, :k]
        weights = probability.gather(-1, expert_ids)
        if self.options.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)

        # One row per slot, sorted by expert; every expert sees its rows, none of them when it was not chosen.
        by_expert, order = expert_ids.flatten().sort(stable=True)
        rows = tokens.unsqueeze(1).expand(-1, k, -1).flatten(0, 1).index_select(0, order)
        counts = torch.bincount(by_expert, minlength=len(self.experts)).tolist()
        outputs = [expert(some)[0] for expert, some in zip(self.experts, rows.split(counts), strict=True)]
        slots = torch.cat(outputs).index_select(0, order.argsort()).unflatten(0, (-1, k))

        routed = (weights.unsqueeze(-1) * slots).sum(1).to(slots.dtype)
        y = routed + torch.sigmoid(self.shared_expert_gate(tokens)) * self.shared_expert(tokens)[0]
        if not self.training:
            return y.view(x.shape), None
        keep = None if padding_mask is None else padding_mask.flatten()
        shares = token_shares(probability, keep)
        record = balance_record(
            expert_ids,
            keep,
            (shares.unsqueeze(-1) * probability).sum(0),
            -(shares.unsqueeze(-1) * probability * log_probability).sum(),
            self.options.router_aux_loss_coef,
        )
        return y.view(x.shape), record

    def flops_per_token(self) -> float:
        one = self.shared_expert.flops_per_token()
        routers = 2.0 * (self.router.weight.numel() + self.shared_expert_gate.weight.numel())
        return routers + one * (self.options.num_experts_per_tok + 1)
