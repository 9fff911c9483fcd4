"""The two published routers of product-key experts: both give scores on two axes of P keys each."""

import torch
from torch import Tensor, nn


class QueryKeyRouter(nn.Module):
    """Scores of learned keys against queries of the token, `s_a[h, p] = <q[a, h], keys[h, p, a]>` for axis a.

    Args:
        width: model width D.
        keys: number of keys per axis P.
        heads: heads H that choose independently.
        size: query channels R of one head, half of them for each axis.
        key_std: standard deviation of the keys at initialisation.

    Cost: 2·H·R·(D + P) operations a token.
    Source: LoserCheems/WonderfulMatrices: modules/cdmoe.py, modules/peer.py.
    """

    no_weight_decay = ("keys",)

    def __init__(self, width: int, keys: int, heads: int, size: int, key_std: float) -> None:
        super().__init__()
        self.key_std = key_std
        self.queries = nn.Linear(width, heads * size, bias=False)
        self.keys = nn.Parameter(torch.empty(heads, keys, 2, size // 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.keys, std=self.key_std)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[N, D]` to the scores on both axes, `[N, H, P]` each."""
        heads, _, _, channels = self.keys.shape
        queries = self.queries(x).unflatten(-1, (2, heads, channels))  # the axis outermost, as published
        scores_x, scores_y = torch.einsum("nahc,hpac->anhp", queries, self.keys).unbind(0)
        return scores_x, scores_y

    def flops_per_token(self) -> float:
        heads, keys, _, channels = self.keys.shape
        return 2.0 * self.queries.weight.numel() + 4.0 * heads * keys * channels


class GateRouter(nn.Module):
    """One linear map to the scores of both axes, a single head.

    Args:
        width: model width D.
        keys: number of keys per axis P.
        token_mixing: False gives each token its own scores: the first half of its row for x, the second for y. True
            reproduces released Doge checkpoints, which read the rows of all N tokens as one list of 2·N half rows:
            token t takes half row t for x, which is of token t // 2, and half row N + t for y, of token (N + t) // 2.
            It then depends on other tokens, on later ones, on other sequences of the batch and on padding.

    Cost: 4·D·P operations a token.
    Source: transformers: models/doge (token_mixing=True); flash-algo/flash-sparse-attention: examples/modeling (False).
    """

    def __init__(self, width: int, keys: int, token_mixing: bool) -> None:
        super().__init__()
        self.token_mixing = token_mixing
        self.gate = nn.Linear(width, 2 * keys, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[N, D]` to the scores on both axes, `[N, 1, P]` each."""
        logits = self.gate(x)
        if self.token_mixing:
            scores_x, scores_y = logits.view(2, len(x), 1, -1).unbind(0)
        else:
            scores_x, scores_y = logits.view(len(x), 2, 1, -1).unbind(1)
        return scores_x, scores_y

    def flops_per_token(self) -> float:
        return 2.0 * self.gate.weight.numel()
