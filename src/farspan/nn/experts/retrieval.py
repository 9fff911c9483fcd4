"""The routed part that `cdmoe` and `peer` share: product-key choice of single-neuron experts and their sum."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from farspan.errors import ConfigError, nearest
from farspan.nn.experts.balance import balance_record, token_shares
from farspan.nn.experts.routers import GateRouter, QueryKeyRouter
from farspan.nn.feed_forward import AuxiliaryRecord, FeedForwardShape, activation
from farspan.ops._contract import without_autocast
from farspan.ops.experts.api import product_key_topk, retrieved_experts

ROUTERS = ("gate", "query_key")


@dataclass
class RetrievalOptions:
    """Options of the routed part.

    Attributes:
        num_experts: number of experts E, a square; every expert is one neuron.
        num_experts_per_tok: experts that each token (and each head) retrieves.
        router: `gate` (one linear map) or `query_key` (learned keys).
        num_expert_heads: heads that choose independently and are summed; `gate` has one.
        retrieval_size: query channels per head of `query_key`, both axes together; None is the model's width.
        token_mixing: `gate` only: routes like released Doge checkpoints, whose tokens depend on other tokens and on
            the future. For converted checkpoints alone.
        key_init_std: standard deviation of the keys of `query_key` at initialisation; None is `initializer_range`.
        hidden_act: activation; None takes the model's `hidden_act`.
        router_aux_loss_coef: factor of this layer's load-balancing loss in training; 0 leaves it out.
        unreachable_experts: rows behind the others in the tables of experts that no pair of keys reaches. Released
            configurations have them (16348 experts are 127² and 219 more); they are kept for the way back.
        pool_aux_loss: whether loads and probabilities are averaged over the layers before the load-balancing loss is
            formed from them, once for the model (released Doge); False forms and adds one loss per layer.
    """

    num_experts: int = 16384
    num_experts_per_tok: int = 64
    router: str = "gate"
    num_expert_heads: int = 1
    retrieval_size: int | None = 64
    token_mixing: bool = False
    key_init_std: float | None = None
    hidden_act: str | None = None
    router_aux_loss_coef: float = 0.001
    unreachable_experts: int = 0
    pool_aux_loss: bool = False

    def __post_init__(self) -> None:
        keys = math.isqrt(max(self.num_experts, 0))
        if keys < 1 or keys * keys != self.num_experts:
            near = " or ".join(str(n * n) for n in (keys, keys + 1) if n)
            raise ConfigError(
                f"num_experts={self.num_experts} must be a square, so that two axes of keys reach every expert; "
                f"choose {near}."
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok={self.num_experts_per_tok} must lie between 1 and num_experts={self.num_experts}."
            )
        if self.router not in ROUTERS:
            raise ConfigError(f"Unknown router {self.router!r}: {nearest(str(self.router), ROUTERS)}")
        if self.num_expert_heads < 1:
            raise ConfigError(f"num_expert_heads={self.num_expert_heads} must be at least 1.")
        if self.router == "gate" and self.num_expert_heads > 1:
            raise ConfigError(
                f"num_expert_heads={self.num_expert_heads}: the gate router has one head; take router='query_key'."
            )
        if self.router != "gate" and self.token_mixing:
            raise ConfigError("token_mixing=true reproduces a form of the gate router; it needs router='gate'.")
        if self.retrieval_size is not None and (self.retrieval_size < 2 or self.retrieval_size % 2):
            raise ConfigError(
                f"retrieval_size={self.retrieval_size} must be even and positive: half of it serves each axis of keys."
            )
        if self.unreachable_experts < 0:
            raise ConfigError(f"unreachable_experts={self.unreachable_experts} must not be negative.")
        if self.key_init_std is not None and self.key_init_std < 0:
            raise ConfigError(f"key_init_std={self.key_init_std} must not be negative; 0 is the released zeros.")
        if self.hidden_act is not None:
            activation(self.hidden_act)
        check_coefficient(self.router_aux_loss_coef)


def check_coefficient(value: float) -> None:
    """Refuses a negative factor of the auxiliary loss."""
    if value < 0:
        raise ConfigError(f"router_aux_loss_coef={value} must not be negative; 0 leaves the loss out.")


class Routing(NamedTuple):
    """What a router decided for N tokens.

    Attributes:
        expert_ids: `[N, H, k]` int64, best first.
        weights: `[N, H, k]`, a softmax over the k retrieved scores of each head.
        scores_x: `[N, H, P]`, the scores on the first axis.
        scores_y: `[N, H, P]`, those on the second.
    """

    expert_ids: Tensor
    weights: Tensor
    scores_x: Tensor
    scores_y: Tensor


class RetrievedExperts(nn.Module):
    """y = sum over heads h and retrieved experts e of softmax_k(s)_he · act(<x, u_e>) · v_e.

    With P² = `num_experts`, expert e = i·P + j has the score s_e = s_x[i] + s_y[j] of the router's two axes.

    Args:
        config: the model's.
        options: sizes and router.
        sets: number of separate expert tables, 1, or `num_expert_heads` for one per head.

    Cost: the router, and 4·H·k·D operations a token; 2·E·D parameters per table.
    """

    no_weight_decay = row_sparse = ("down", "up")

    def __init__(self, config: FeedForwardShape, options: RetrievalOptions, sets: int = 1) -> None:
        super().__init__()
        width, keys = config.hidden_size, math.isqrt(options.num_experts)
        self.options = options
        self.sets = sets
        self.activation = options.hidden_act or config.hidden_act
        self.init_std = config.initializer_range
        key_std = config.initializer_range if options.key_init_std is None else options.key_init_std
        self.router: GateRouter | QueryKeyRouter
        if options.router == "gate":
            self.router = GateRouter(width, keys, options.token_mixing)
        else:
            size = options.retrieval_size or width
            if size % 2:
                raise ConfigError(f"retrieval_size=null takes hidden_size={width}, which must be even; set it.")
            self.router = QueryKeyRouter(width, keys, options.num_expert_heads, size, key_std)
        rows = sets * options.num_experts + options.unreachable_experts
        self.down = nn.Parameter(torch.empty(rows, width))
        self.up = nn.Parameter(torch.empty(rows, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.down, std=self.init_std)
        nn.init.normal_(self.up, std=self.init_std)

    def route(self, x: Tensor) -> Routing:
        """Chooses the experts of the tokens `[N, D]`."""
        scores_x, scores_y = self.router(x)
        scores, expert_ids = product_key_topk(scores_x, scores_y, self.options.num_experts_per_tok)
        wide = torch.promote_types(scores.dtype, torch.float32)
        return Routing(expert_ids, torch.softmax(scores, dim=-1, dtype=wide), scores_x, scores_y)

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, dropout: float = 0.0
    ) -> tuple[Tensor, AuxiliaryRecord | None]:
        """`[..., D]` to `[..., D]`, and in training mode the record.

        Args:
            x: `[..., D]`.
            padding_mask: `[...]` bool, True for tokens that the record counts; None counts all.
            dropout: probability with which a retrieved expert is left out, in training mode.
        """
        tokens = x.flatten(0, -2)
        routing = self.route(tokens)
        expert_ids, weights = routing.expert_ids, routing.weights
        if self.sets > 1:
            expert_ids = expert_ids + self.options.num_experts * torch.arange(self.sets, device=x.device).unsqueeze(-1)
        weights = nn.functional.dropout(weights, dropout, self.training)
        y = retrieved_experts(
            tokens, expert_ids.flatten(1), weights.flatten(1), self.down, self.up, activation=self.activation
        )
        keep = None if padding_mask is None else padding_mask.flatten()
        return y.view(x.shape), self._record(routing, keep) if self.training else None

    def _record(self, routing: Routing, keep: Tensor | None) -> AuxiliaryRecord:
        # The softmax over all sums of two scores is the product of the softmaxes over either.
        scores = torch.stack((routing.scores_x, routing.scores_y)).to(routing.weights.dtype)
        log_p = torch.log_softmax(scores, dim=-1)
        p = log_p.exp()
        weighted = p * (token_shares(p[0], keep) / p.shape[2]).view(-1, 1, 1)
        with without_autocast(p):
            probability = weighted[0].flatten(0, 1).mT @ p[1].flatten(0, 1)
            entropy = -torch.dot(weighted.detach().flatten(), log_p.detach().flatten())
        return balance_record(
            routing.expert_ids.flatten(1),
            keep,
            probability.flatten(),
            entropy,
            self.options.router_aux_loss_coef,
            self.options.pool_aux_loss,
        )

    def flops_per_token(self) -> float:
        slots = self.options.num_expert_heads * self.options.num_experts_per_tok
        return self.router.flops_per_token() + 4.0 * slots * self.down.shape[1]
