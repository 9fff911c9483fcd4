"""PEER: parameter-efficient expert retrieval, a feed-forward of retrieved single neurons alone."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from farspan.errors import ConfigError
from farspan.nn.experts.retrieval import RetrievalOptions, RetrievedExperts
from farspan.nn.feed_forward import AuxiliaryRecord, FeedForward, FeedForwardShape
from farspan.nn.norms import RMSNorm


@dataclass
class PEEROptions(RetrievalOptions):
    """Options of `peer`: those of the routed part with other defaults, and its own.

    Published are 1,000,000 experts; the default here is that of `cdmoe`.

    Attributes:
        num_experts_per_tok: experts that each head retrieves.
        router: `query_key` as published, or `gate`.
        num_expert_heads: heads that choose independently and are summed.
        retrieval_size: query channels per head, both axes together; None is the model's width, as published.
        key_init_std: standard deviation of the keys at initialisation.
        hidden_act: activation.
        router_aux_loss_coef: factor of this layer's load-balancing loss in training; published without one.
        pre_norm: whether an RMSNorm stands before router and experts (the block has its own already).
        expert_dropout: probability with which a retrieved expert is left out in training.
        separate_experts: whether each head has a table of experts of its own.
    """

    num_experts_per_tok: int = 16
    router: str = "query_key"
    num_expert_heads: int = 8
    retrieval_size: int | None = None
    key_init_std: float | None = 1.0
    hidden_act: str | None = "gelu"
    router_aux_loss_coef: float = 0.0
    pre_norm: bool = False
    expert_dropout: float = 0.0
    separate_experts: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.expert_dropout < 1:
            raise ConfigError(f"expert_dropout={self.expert_dropout} must lie in [0, 1).")


class PEER(FeedForward):
    """y = sum over heads and retrieved experts e of w_e · act(<x, u_e>) · v_e.

    The released code selects by mistake (indices of one axis serve as scores, and places in the list of candidates as
    expert ids); this is the intended form.

    Cost: the router + 4·H·k·D operations a token; 2·E·D parameters of experts.
    Source: He 2024, arXiv 2407.04153; LoserCheems/WonderfulMatrices: modules/peer.py.
    """

    reads_padding: ClassVar[bool] = True

    def __init__(self, config: FeedForwardShape, options: PEEROptions) -> None:
        super().__init__()
        self.options = options
        self.norm = RMSNorm(config.hidden_size, config.norm_eps) if options.pre_norm else None
        self.experts = RetrievedExperts(config, options, options.num_expert_heads if options.separate_experts else 1)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, AuxiliaryRecord | None]:
        x = x if self.norm is None else self.norm(x)
        return self.experts(x, padding_mask, self.options.expert_dropout)

    def flops_per_token(self) -> float:
        return self.experts.flops_per_token()
