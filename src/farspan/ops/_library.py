"""Operators as nodes of PyTorch: what torch.compile sees in place of the many steps of an implementation.

A node is a function of tensors and numbers that is registered with `torch.library`. Its gradient is an
`torch.autograd.Function` around two nodes, which costs less per call than a registered formula and is traced as well.
"""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("farspan", "FRAGMENT")
_DEVICES = ("CPU", "CUDA")


def register_node(schema: str, run: Callable[..., Any], shapes: Callable[..., Any]) -> Callable[..., Any]:
    """Registers a function as `torch.ops.farspan.<name>`.

    Args:
        schema: name, arguments and results as `torch.library` writes them; results are new tensors.
        run: the function, on real tensors; it may read their values.
        shapes: the same call on tensors without values: it gives empty results of the right shape, dtype and device.

    Returns:
        The registered function.
    """
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.partition("(")[0]
    for device in _DEVICES:
        _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"farspan::{name}", shapes, lib=_LIBRARY)
    node: Callable[..., Any] = getattr(torch.ops.farspan, name).default
    return node


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor has numbers of its own in memory, as traced and vectorised ones have not."""
    try:
        return type(tensor) is torch.Tensor and tensor.data_ptr() != 0
    except RuntimeError:
        return False
