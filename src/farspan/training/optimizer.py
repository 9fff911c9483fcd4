"""AdamW with decay groups, and learning-rate schedules as pure functions of the step."""

import math
from typing import Any

import torch
from torch import nn

from farspan.errors import ConfigError
from farspan.training.recipe import TrainRecipe
from farspan.training.row_sparse import RowSparseAdamW


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Splits the trainable parameters into those that decay towards zero and those that must not.

    Weight decay is a prior of small matrices. It is wrong for everything that acts as a scale, a bias or a rate, so a
    parameter is left alone if it has fewer than two dimensions or if the module that owns it lists its name in the
    class attribute `no_weight_decay`.

    Args:
        model: The model; a parameter that several modules share (tied embeddings) appears once, and is left alone if
            any of its owners asks for it.
        weight_decay: The decay of the first group.

    Returns:
        Two parameter groups for a torch optimiser: decaying, not decaying.
    """
    parameters: dict[int, nn.Parameter] = {}
    exempt: set[int] = set()
    for module in model.modules():
        names = getattr(type(module), "no_weight_decay", ())
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                parameters[id(parameter)] = parameter
                if parameter.ndim < 2 or name in names:
                    exempt.add(id(parameter))
    return [
        {"params": [p for key, p in parameters.items() if key not in exempt], "weight_decay": weight_decay},
        {"params": [p for key, p in parameters.items() if key in exempt], "weight_decay": 0.0},
    ]


def row_sparse_tables(model: nn.Module, embeddings: bool = False) -> list[nn.Parameter]:
    """The trainable tables of which a step reads few rows.

    Args:
        model: The model; its modules list the names of such tables in the class attribute `row_sparse`.
        embeddings: Whether the tables of `nn.Embedding` count, too.
    """
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        names = getattr(type(module), "row_sparse", ())
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and (name in names or (embeddings and isinstance(module, nn.Embedding))):
                found[id(parameter)] = parameter
    return list(found.values())


def build_optimizer(model: nn.Module, recipe: TrainRecipe) -> torch.optim.AdamW:
    """AdamW over the decay groups of `model`; one fused kernel per step, on CPU and GPU alike.

    With `recipe.row_sparse`, a `RowSparseAdamW` that updates the tables so named by rows.

    Raises:
        ConfigError: `recipe.row_sparse` names tables, and the model has none.
    """
    groups = decay_groups(model, recipe.weight_decay)
    options: dict[str, Any] = {
        "lr": recipe.learning_rate,
        "betas": (recipe.adam_beta1, recipe.adam_beta2),
        "eps": recipe.adam_epsilon,
    }
    if recipe.row_sparse == "none":
        return torch.optim.AdamW([group for group in groups if group["params"]], fused=True, **options)
    tables = {id(table) for table in row_sparse_tables(model, recipe.row_sparse == "all")}
    if not tables:
        raise ConfigError(
            f"train.row_sparse={recipe.row_sparse!r}: this model has no such tables; they are those of the experts of "
            "cdmoe and peer, with 'all' those of embeddings, too. Give 'none'."
        )
    split = [
        {**group, "params": [p for p in group["params"] if (id(p) in tables) == sparse], "row_sparse": sparse}
        for group in groups
        for sparse in (False, True)
    ]
    return RowSparseAdamW([group for group in split if group["params"]], **options)


def learning_rate(step: int, recipe: TrainRecipe, total_steps: int) -> float:
    """Learning rate of optimiser step `step`.

    Warm-up rises linearly, `peak·s/warmup_steps` with `s = step + 1`, so that the first step already moves. After it,
    with `p` from 0 to 1 over the rest of the run and `m = min_lr_ratio`:

        cosine    peak · (m + (1 - m)·(1 + cos πp)/2)
        linear    peak · (1 - (1 - m)·p)
        wsd       peak, then over the last `decay_steps` steps peak · (m + (1 - m)·(1 - √p)), p counted there
        constant  peak

    Args:
        step: Steps done before this one, from 0.
        recipe: Peak, kind, warm-up, decay and minimum ratio.
        total_steps: Length of the run; the last step, `total_steps - 1`, has p = 1.

    Returns:
        The learning rate, a pure function of the arguments, so that resuming needs no scheduler state.
    """
    peak, least, s = recipe.learning_rate, recipe.min_lr_ratio, step + 1
    if s <= recipe.warmup_steps:
        return peak * s / recipe.warmup_steps
    if recipe.lr_scheduler_type == "constant":
        return peak
    if recipe.lr_scheduler_type == "wsd":
        decay_steps = min(recipe.decay_steps or math.ceil(total_steps / 5), total_steps - recipe.warmup_steps)
        p = max(0.0, (s - (total_steps - decay_steps)) / decay_steps)
        return peak * (least + (1 - least) * (1 - math.sqrt(p)))
    p = min(1.0, (s - recipe.warmup_steps) / max(1, total_steps - recipe.warmup_steps))
    if recipe.lr_scheduler_type == "linear":
        return peak * (1 - (1 - least) * p)
    return peak * (least + (1 - least) * (1 + math.cos(math.pi * p)) / 2)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Sets the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value
