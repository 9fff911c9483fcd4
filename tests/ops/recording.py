"""What interpreted tests have run: kernels with the types of their tensors, nodes of PyTorch, checked as they run."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

KERNELS: dict[str, set[torch.dtype]] = {}
NODES: set[str] = set()


def record_kernels() -> None:
    """Lets Triton's interpreter write down in `KERNELS` what it runs."""
    from triton.runtime import interpreter

    run = interpreter.GridExecutor.__call__

    def recorded(self: Any, *arguments: Any, **options: Any) -> Any:
        dtypes = {x.dtype for x in tree_leaves(arguments) if isinstance(x, Tensor)}
        KERNELS.setdefault(f"{self.fn.__module__}.{self.fn.__name__}", set()).update(dtypes)
        return run(self, *arguments, **options)

    interpreter.GridExecutor.__call__ = recorded


class CheckedNodes(TorchDispatchMode):
    """Every node gives new tensors of the shapes, dtypes and strides that it declares, and leaves its inputs alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "farspan" or any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        NODES.add(func._schema.name)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        before = [x.clone() for x in given]
        results = func(*args, **kwargs)
        fake = FakeTensorMode()
        imagined = tree_map_only(Tensor, lambda x: fake.from_tensor(x.detach()), (args, kwargs))
        with fake:
            declared = tree_leaves(func(*imagined[0], **imagined[1]))
        found, name = tree_leaves(results), func._schema.name
        for i, (x, y) in enumerate(zip(found, declared, strict=True)):
            real, said = ((z.shape, z.dtype, z.stride() if z.numel() else ()) for z in (x, y))
            assert real == said, f"{name}: result {i} is {real}, declared as {said}"
        theirs, own = ([x.untyped_storage().data_ptr() for x in side if x.numel()] for side in (given, found))
        assert len({*own} - {*theirs}) == len(own), f"{name}: results share memory with each other or with an input"
        for i, (x, y) in enumerate(zip(given, before, strict=True)):
            assert bool(((x == y) | (x.isnan() & y.isnan())).all()), f"{name}: changes its tensor {i}"
        return results


def rehearsed_and_launched(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> tuple[set[Any], set[Any]]:
    """The launches of a module from now on, as far as the compiler tells them apart: compiled ahead, and started."""
    launch, rehearsing = module.launch, False
    rehearsed: set[Any] = set()
    launched: set[Any] = set()

    def kind(argument: Any) -> Any:
        if isinstance(argument, tuple):
            return tuple(map(kind, argument))
        return argument.dtype if isinstance(argument, Tensor) else type(argument)

    def record(kernel: Any, grid: Any, arguments: Any, constants: Any, *schedule: int) -> None:
        (rehearsed if rehearsing else launched).add(
            (kernel.__name__, id(constants), tuple(map(kind, arguments)), schedule)
        )
        if not rehearsing:
            launch(kernel, grid, arguments, constants, *schedule)

    def rehearse(_: object, call: Any) -> None:
        nonlocal rehearsing
        rehearsing = True
        call()
        rehearsing = False

    monkeypatch.setattr(module, "launch", record)
    monkeypatch.setattr(module, "compile_ahead", rehearse)
    return rehearsed, launched
