"""The public functions of retrieved experts: checks, choice of the backend, call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from farspan.errors import ConfigError, ShapeError
from farspan.ops._backend import no_double, register, resolve
from farspan.ops._contract import Contract, without_autocast
from farspan.ops.activations import ACTIVATIONS
from farspan.ops.experts.reference import product_key_topk_reference, retrieved_experts_reference
from farspan.ops.experts.torch import product_key_topk_sorted, retrieved_experts_bags

# What a program of the kernels holds: keys of an axis, chosen experts, bytes of a row.
MOST_KEYS, MOST_CHOSEN, WIDEST = 1024, 256, 16384


def too_wide(tensors: Sequence[Tensor]) -> str | None:
    """Why the kernels of experts cannot serve tokens, ..., and a table; None if they can."""
    tokens, table = tensors[0], tensors[-1]
    size, width = max(tokens.element_size(), table.element_size()), table.shape[1]
    if width * size > WIDEST:
        return f"the kernels hold rows of at most D={WIDEST // size} numbers of {size} bytes, not {width}"
    return no_double(tensors)


register(
    "product_key_topk",
    reference=product_key_topk_reference,
    torch=product_key_topk_sorted,
    triton="farspan.ops.experts.routing_triton:product_key_topk_triton",
    triton_limits=no_double,
)
register(
    "retrieved_experts",
    reference=retrieved_experts_reference,
    torch=retrieved_experts_bags,
    triton="farspan.ops.experts.triton:retrieved_experts_triton",
    triton_limits=too_wide,
)


def product_key_topk(scores_x: Tensor, scores_y: Tensor, k: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The k best of P² experts whose scores are sums of a score on each of two axes.

    Expert `e = i · P + j` of one token and head has the score

        s_e = scores_x[i] + scores_y[j]

    and the k largest are returned, best first. The choice is exact. Of equal sums the one with the larger
    `scores_x` wins, then the larger `scores_y`; of equal scores on an axis the smaller index. The choice itself is
    not differentiated, the returned scores are.

    Args:
        scores_x: `[N, H, P]`, any floating dtype: for each of N tokens and H heads the P keys of the first axis.
        scores_y: `[N, H, P]`, of the same dtype: those of the second axis.
        k: number of experts to choose, 1 ≤ k ≤ P².
        backend: `"auto"`, `"reference"`, `"torch"` or `"triton"`.

    Returns:
        The scores, `[N, H, k]` in the dtype of `scores_x`, falling along the last dimension, and the ids, `[N, H, k]`
        int64 in [0, P²).

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
        ConfigError: k out of range, or an unknown backend.
        BackendUnavailable: a backend that was named and cannot serve.

    Cost:
        Time O(N · H · (P log P + k log² k)), memory O(N · H · k log k): with ranks i, j counted from 1, only pairs
        with i · j ≤ k can be among the best k. (The reference forms all P² sums.)

    Note:
        The released code of Doge sorts all P² sums of every token; that of PEER takes the k best of each axis and then
        of their k² sums. All give the same experts, ties aside.

    Source:
        Lample et al., "Large memory layers with product keys" (arXiv:1907.05242), section 3.2;
        LoserCheems/WonderfulMatrices: modules/cdmoe.py; transformers: models/doge.

    Example:
        >>> import torch
        >>> x, y = torch.tensor([[[0.0, 3.0, 1.0]]]), torch.tensor([[[0.5, 0.0, 2.0]]])
        >>> scores, ids = product_key_topk(x, y, 3)
        >>> scores.flatten().tolist(), ids.flatten().tolist()
        ([5.0, 3.5, 3.0], [5, 3, 4])
    """
    contract = Contract("product_key_topk")
    contract.tensor("scores_x", scores_x, "N H P")
    contract.tensor("scores_y", scores_y, "N H P")
    if scores_x.dtype != scores_y.dtype:
        raise ShapeError(
            f"product_key_topk: scores_x is {scores_x.dtype}, scores_y is {scores_y.dtype}; give both in one dtype."
        )
    experts = contract.sizes["P"] ** 2
    if not 1 <= k <= experts:
        raise ConfigError(f"product_key_topk: k={k} must lie between 1 and P²={experts}.")
    beyond = None
    if contract.sizes["P"] > MOST_KEYS or k > MOST_CHOSEN:
        beyond = f"the kernels rank at most P={MOST_KEYS} keys and choose at most k={MOST_CHOSEN}"
    implementation = resolve("product_key_topk", backend, (scores_x, scores_y), beyond_kernels=beyond)
    return implementation(scores_x, scores_y, k)


def retrieved_experts(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    activation: str = "silu",
    backend: str = "auto",
) -> Tensor:
    """The weighted sum of single-neuron experts that each token has retrieved.

    For token n with slots r, expert e = expert_ids[n, r], u_e = down[e] and v_e = up[e]:

        out_n = sum_r weights[n, r] · act( <x_n, u_e> ) · v_e

    An expert may stand in several slots of a token (heads choose independently); each counts.

    Args:
        x: tokens, `[N, D]`, any floating dtype.
        expert_ids: `[N, R]` int64 in [0, E); R is heads times experts per head.
        weights: `[N, R]`, such as a softmax over the retrieved scores of each head.
        down: u, `[E, D]`, one input vector per expert.
        up: v, `[E, D]`, one output vector per expert.
        activation: `"silu"`, `"gelu"`, `"gelu_tanh"`, `"relu"` or `"sigmoid"`.
        backend: `"auto"`, `"reference"`, `"torch"` or `"triton"`.

    Returns:
        `[N, D]` in x's dtype. Differentiable in x, weights, down and up, to any order; sums run in a fixed order.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
        ConfigError: an unknown activation or backend.
        BackendUnavailable: a backend that was named and cannot serve.

    Cost:
        4 · R · D operations a token forward, which reads 2 · R rows of D numbers: memory-bound. Memory for the
        backward pass O(N · R): no `[N, R, D]` tensor is formed (the reference forms two). The gradients of `down` and
        `up` are dense, O(E · D); the kernels form none where both tables are frozen.

    Note:
        Ids are not checked here; one outside [0, E) fails in the gather.

    Source:
        He, "Mixture of a million experts" (arXiv:2407.04153), algorithm 1; LoserCheems/WonderfulMatrices:
        modules/cdmoe.py.

    Example:
        >>> import torch
        >>> x, table = torch.tensor([[1.0, -2.0]]), torch.eye(2)
        >>> retrieved_experts(x, torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]), table, table, activation="relu")
        tensor([[0.5000, 0.0000]])
    """
    contract = Contract("retrieved_experts")
    contract.tensor("x", x, "N D")
    contract.tensor("weights", weights, "N R")
    contract.tensor("down", down, "E D")
    contract.tensor("up", up, "E D")
    if expert_ids.dtype != torch.int64 or expert_ids.shape != weights.shape or expert_ids.device != x.device:
        raise ShapeError(
            f"retrieved_experts: expert_ids is {expert_ids.dtype} {list(expert_ids.shape)} on {expert_ids.device}; "
            f"expected int64 [N, R]={list(weights.shape)} on {x.device}."
        )
    contract.choice("activation", activation, tuple(ACTIVATIONS))
    implementation = resolve("retrieved_experts", backend, (x, weights, down, up))
    with without_autocast(x):
        return implementation(x, expert_ids, weights, down, up, activation=activation)
