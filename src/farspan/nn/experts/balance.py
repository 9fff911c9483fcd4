"""How evenly a router uses its experts: the auxiliary loss and the numbers for the log."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from farspan.nn.feed_forward import AuxiliaryRecord


def load_balance(load: Tensor, probability: Tensor) -> Tensor:
    """The load-balancing loss `E · sum_e load_e · probability_e`.

    It is 1 when the mean probabilities are uniform, whatever the load, and E when one expert has all of both. Only the
    probability carries a gradient: experts that are chosen more often than others are made less likely.

    Args:
        load: share of the selections that each expert received, `[E]`, summing to 1.
        probability: mean probability of each expert, `[E]`, summing to 1.

    Returns:
        A scalar.

    Note:
        Over several layers the released code of Doge concatenates their tokens first: that is
        `load_balance(mean of the loads, mean of the probabilities)`, see `pool_aux_loss`. Without that option the model
        sums one loss per layer.

    Source:
        Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6; transformers: models/doge.

    Example:
        >>> import torch
        >>> load_balance(torch.tensor([0.75, 0.25]), torch.tensor([1.0, 0.0])).item()
        1.5
    """
    return load.numel() * (load * probability).sum()


def token_shares(probability: Tensor, keep: Tensor | None) -> Tensor:
    """The weight of each token in a mean over the real ones: `[N]`, summing to 1, 0 at padding.

    Args:
        probability: `[N, ...]`, what is to be averaged; gives number, dtype and device.
        keep: `[N]` bool, True for real tokens; None means all.
    """
    if keep is None:
        return probability.new_full((len(probability),), 1 / max(1, len(probability)))
    counted = keep.to(probability.dtype)
    return counted / counted.sum().clamp(min=1)


def balance_record(
    expert_ids: Tensor,
    keep: Tensor | None,
    probability: Tensor,
    entropy: Tensor,
    coefficient: float,
    pool: bool = False,
) -> AuxiliaryRecord:
    """What a router reports of one forward pass.

    Args:
        expert_ids: the selections, `[N, R]` int64.
        keep: `[N]` bool, True for the tokens that count; None means all.
        probability: mean probability of each expert over the tokens, `[E]`, differentiable.
        entropy: mean entropy of the router's distribution over the experts, in nats.
        coefficient: factor of the auxiliary loss; 0 leaves the loss out.
        pool: whether the loss is left to `auxiliary_loss`, which forms it from the means over the layers.

    Returns:
        The record; its statistics are

        - `experts_used`: share of the experts that were chosen at least once;
        - `busiest_expert`: the largest load, as a multiple of an even one;
        - `load_entropy`: entropy of the load, 1 for an even one, 0 if one expert has it all;
        - `router_entropy`: entropy of the router's distribution per token on the same scale.
    """
    experts = probability.numel()
    counted = expert_ids.new_ones(1, 1, dtype=torch.int32) if keep is None else keep.int().unsqueeze(-1)
    # Integers, whose sums do not depend on their order.
    counts = counted.new_zeros(experts).scatter_add(0, expert_ids.flatten(), counted.expand_as(expert_ids).flatten())
    load = counts.to(probability.dtype) / counts.sum().clamp(min=1)
    largest = math.log(max(experts, 2))
    statistics = {
        "experts_used": (load > 0).to(load.dtype).mean(),
        "busiest_expert": load.max() * experts,
        "load_entropy": torch.special.entr(load).sum() / largest,
        "router_entropy": entropy.detach() / largest,
    }
    if pool:
        return AuxiliaryRecord(None, statistics, load, probability, coefficient)
    loss = coefficient * load_balance(load, probability) if coefficient else None
    return AuxiliaryRecord(loss, statistics, load, probability)


def auxiliary_loss(records: Iterable[AuxiliaryRecord | None]) -> Tensor | None:
    """What all layers together add to the training loss.

    It is the sum of the records' losses and, over the layers of each factor c and number of experts that pool them, of
    `c · load_balance(mean load, mean probability)`.

    Args:
        records: one per layer, None for a layer that reports nothing.

    Returns:
        A scalar, or None if no layer has a loss.
    """
    found = [record for record in records if record is not None]
    losses = [record.loss for record in found if record.loss is not None]
    pools: dict[tuple[float, int], list[tuple[Tensor, Tensor]]] = {}
    for record in found:
        if record.pooled and record.load is not None and record.probability is not None:
            key = (record.pooled, record.load.numel())
            pools.setdefault(key, []).append((record.load, record.probability))
    for (coefficient, _), layers in pools.items():
        load, probability = (torch.stack(part).mean(0) for part in zip(*layers, strict=True))
        losses.append(coefficient * load_balance(load, probability))
    return torch.stack(losses).sum() if losses else None
