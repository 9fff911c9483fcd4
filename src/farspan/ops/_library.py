"""Operators as nodes of PyTorch: what torch.compile sees in place of the many steps of an implementation.

A node is a function of tensors and numbers that is registered with `torch.library`. Its gradient is an
`torch.autograd.Function` around two nodes, which costs less per call than a registered formula and is traced as well.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from farspan.ops._contract import plain_backward

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


def register_recomputed(name: str, options: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Registers attention within packed documents as a node of compiled graphs, which know no boundaries.

    Nothing but the arguments is kept: the gradient, a node too, runs the function again.

    Args:
        name: of the node.
        options: the arguments behind tensors and boundaries as `torch.library` writes them.
        run: `run(tensors, cu_seqlens, *options)`; the tensors begin with q, k and v, others may be None.

    Returns:
        A function of the same arguments and `random`, whether numbers are drawn: `[B, T, H, V]` in v's dtype.
    """

    def attend(tensors: Sequence[Tensor | None], cu_seqlens: Tensor, seed: Tensor | None, *others: Any) -> Tensor:
        with _seeded(seed, cu_seqlens.device):
            return run(tensors, cu_seqlens, *others).contiguous()

    def backward(
        grad: Tensor,
        tensors: Sequence[Tensor | None],
        cu_seqlens: Tensor,
        seed: Tensor | None,
        wanted: Sequence[bool],
        *others: Any,
    ) -> list[Tensor]:
        with _differentiating():
            leaves = [
                x if x is None else x.detach().requires_grad_(want) for x, want in zip(tensors, wanted, strict=True)
            ]
            out = attend(leaves, cu_seqlens, seed, *others)
            asked = [x for x in leaves if x is not None and x.requires_grad]
            found = iter(torch.autograd.grad(out, asked, grad, materialize_grads=True))
        return [next(found).contiguous() if want else grad.new_empty(0) for want in wanted]

    def shapes(tensors: Sequence[Tensor | None], *others: Any) -> Tensor:
        q, _, v = tensors[:3]
        assert q is not None and v is not None  # attention has both
        return v.new_empty(*q.shape[:3], v.shape[3])

    def gradient_shapes(
        grad: Tensor, tensors: Sequence[Tensor | None], cu: Tensor, seed: Tensor | None, wanted: Sequence[bool], *_: Any
    ) -> list[Tensor]:
        pairs = zip(tensors, wanted, strict=True)
        return [x.new_empty(x.shape) if want and x is not None else grad.new_empty(0) for x, want in pairs]

    given = "Tensor?[] tensors, Tensor cu_seqlens, Tensor? seed"
    node = register_node(f"{name}({given}, {options}) -> Tensor", torch.no_grad()(attend), shapes)
    gradient_node = register_node(
        f"{name}_gradient(Tensor grad, {given}, bool[] wanted, {options}) -> Tensor[]", backward, gradient_shapes
    )

    class Recomputed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, cu_seqlens: Tensor, seed: Tensor | None, others: Any, *tensors: Tensor | None) -> Tensor:
            ctx.save_for_backward(cu_seqlens, seed, *tensors)
            ctx.others = others
            out: Tensor = node(tensors, cu_seqlens, seed, *others)
            return out

        @staticmethod
        @plain_backward
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            cu_seqlens, seed, *tensors = ctx.saved_tensors
            wanted = list(ctx.needs_input_grad[3:])
            found = gradient_node(grad, tensors, cu_seqlens, seed, wanted, *ctx.others)
            return (None, None, None, *(x if want else None for x, want in zip(found, wanted, strict=True)))

    def call(tensors: Sequence[Tensor | None], cu_seqlens: Tensor, *others: Any, random: bool = False) -> Tensor:
        seed = torch.randint(1 << 62, ()) if random else None
        out: Tensor = Recomputed.apply(cu_seqlens, seed, others, *tensors)
        return out

    return call


@contextlib.contextmanager
def _differentiating() -> Iterator[None]:
    """Records gradients, also below a dispatch mode (of a counter, of a check), which switches that off for nodes."""
    keys, excluded = torch._C.DispatchKey, torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.AutogradNestedTensor, keys.ADInplaceOrView):
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


@contextlib.contextmanager
def _seeded(seed: Tensor | None, device: torch.device) -> Iterator[None]:
    """Draws the same numbers whenever it is given the same seed, and leaves the generators as they were."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(seed))
        yield


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor has numbers of its own in memory, as traced and vectorised ones have not."""
    try:
        return type(tensor) is torch.Tensor and tensor.data_ptr() != 0
    except RuntimeError:
        return False
