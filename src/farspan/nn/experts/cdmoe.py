"""Cross-domain mixture of experts: a gated MLP for all tokens beside experts that each token retrieves."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from farspan.nn.experts.retrieval import RetrievalOptions, RetrievedExperts
from farspan.nn.feed_forward import AuxiliaryRecord, FeedForward, FeedForwardShape, GatedMLP, MLPOptions


@dataclass
class CDMoEOptions(RetrievalOptions):
    """Options of `cdmoe`: those of the routed part, and of the gated MLP beside it.

    Attributes:
        intermediate_size: inner width of the gated MLP; None takes the model's `intermediate_size`.
        bias: whether the projections of the gated MLP have biases.
    """

    intermediate_size: int | None = None
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.shared()

    def shared(self) -> MLPOptions:
        """The options of the gated MLP."""
        return MLPOptions(self.intermediate_size, self.hidden_act, self.bias)


class CDMoE(FeedForward):
    """y = (act(x W_gate) ∘ x W_up) W_down + sum over retrieved experts e of w_e · act(<x, u_e>) · v_e.

    With `up` of the experts at zero this is `gated_mlp` exactly, so a dense model can be continued with experts.

    Cost: 6·D·F + the router + 4·H·k·D operations a token; 2·E·D parameters of experts.
    Source: Shi et al. 2024, arXiv 2412.11834; LoserCheems/WonderfulMatrices: modules/cdmoe.py;
    transformers: models/doge.
    """

    reads_padding: ClassVar[bool] = True

    def __init__(self, config: FeedForwardShape, options: CDMoEOptions) -> None:
        super().__init__()
        self.shared = GatedMLP(config, options.shared())
        self.experts = RetrievedExperts(config, options)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, AuxiliaryRecord | None]:
        routed, record = self.experts(x, padding_mask)
        return self.shared(x)[0] + routed, record

    def flops_per_token(self) -> float:
        return self.shared.flops_per_token() + self.experts.flops_per_token()
