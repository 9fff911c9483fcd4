"""Which implementation serves a call, and why another one cannot.

Each operator registers its implementations by name when its `api` module is imported. The choice is made per call from
the tensors alone: no environment variable, no query at import time, no silent fallback when a backend was named.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farspan.errors import BackendUnavailable, ConfigError, nearest

Implementation = Callable[..., Any]
Limits = Callable[[Sequence[Tensor]], str | None]

BACKENDS = ("auto", "reference", "torch", "triton")
OLDEST_CAPABILITY = (8, 0)


@dataclass
class _Kernels:
    """Where an operator's kernels are, and their function once it has been asked for."""

    place: str
    function: Implementation | None = None


_implementations: dict[str, dict[str, Implementation]] = {}
_kernels: dict[str, _Kernels] = {}
_limits: dict[str, Limits] = {}
_by_name: set[str] = set()


def _constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets torch.compile ask once; `torch.compiler.assume_constant_result` would import the compiler, and triton."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def register(
    op: str,
    *,
    reference: Implementation,
    torch: Implementation,
    triton: str | None = None,
    triton_limits: Limits | None = None,
    automatic: bool = True,
) -> None:
    """Registers the implementations of one operator.

    Args:
        op: public name of the operator.
        reference: the readable form that defines the operator.
        torch: the fast form in PyTorch; may be the same function.
        triton: `"module:function"` of the kernel form, imported at its first use; None when there is none.
        triton_limits: given the tensors of a call, says why the kernels cannot serve them, or None.
        automatic: whether `"auto"` takes the kernels; False for kernels that have not been proved on a card yet, which
            have to be named.
    """
    _implementations[op] = {"reference": reference, "torch": torch}
    if triton is not None:
        _kernels[op] = _Kernels(triton)
    if triton_limits is not None:
        _limits[op] = triton_limits
    if not automatic:
        _by_name.add(op)


def resolve(
    op: str, backend: str, tensors: Sequence[Tensor | None], *, beyond_kernels: str | None = None
) -> Implementation:
    """Chooses the implementation of one call.

    `"auto"` takes the kernels where they are registered and serve these tensors, otherwise the PyTorch form.

    Args:
        op: public name of the operator.
        backend: one of `"auto"`, `"reference"`, `"torch"`, `"triton"`.
        tensors: the tensors of the call; None entries are left out.
        beyond_kernels: why the options of this call are beyond the kernels, or None if they are not.

    Returns:
        The function to call.

    Raises:
        ConfigError: the backend's name is not known.
        BackendUnavailable: the backend was named and cannot serve; the message says why and what works.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"{op}: backend={backend!r} is not known; {nearest(backend, BACKENDS)}")
    given = [tensor for tensor in tensors if tensor is not None]
    if backend == "auto":
        on_gpu = len(given) > 0 and given[0].is_cuda and op not in _by_name
        serves = on_gpu and triton_reason(op, given) is None and beyond_kernels is None
        backend = "triton" if serves else "torch"
    elif backend == "triton":
        reason = triton_reason(op, given) or beyond_kernels
        if reason is not None:
            raise BackendUnavailable(f"{op}: backend='triton' cannot serve here: {reason}; use backend='torch'.")
    if backend != "triton":
        return _implementations[op][backend]
    _load(op)
    function = _kernels[op].function
    assert function is not None  # loaded above
    return function


def availability() -> dict[str, dict[str, str | None]]:
    """Each operator's backends: None when it can serve on this machine, otherwise the reason why not."""
    return {op: {"reference": None, "torch": None, "triton": triton_reason(op)} for op in sorted(_implementations)}


def triton_reason(op: str, tensors: Sequence[Tensor] = ()) -> str | None:
    """Why the kernels of an operator cannot serve on this machine, or these tensors; None if they can."""
    if op not in _kernels:
        return "this operator has no kernels"
    if tensors and not tensors[0].is_cuda:
        return f"the tensors are on {tensors[0].device}"
    reason = _machine_reason(tensors[0].get_device() if tensors else None)
    if reason is not None:
        return reason
    return _limits[op](tensors) if tensors and op in _limits else None


def no_double(tensors: Sequence[Tensor]) -> str | None:
    """Limits of kernels that compute in float32: why they cannot serve these tensors; None if they can."""
    return "the kernels compute in float32" if any(x.dtype == torch.float64 for x in tensors) else None


@_constant
def _machine_reason(device: int | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'farspan[gpu]')"
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return f"the device has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0"
    return None


@_constant
def _load(op: str) -> None:
    kernels = _kernels[op]
    if kernels.function is None:
        module, _, function = kernels.place.partition(":")
        kernels.function = _on_its_device(getattr(importlib.import_module(module), function))


def _on_its_device(function: Implementation) -> Implementation:
    """Lets kernels start on the device of the first tensor: Triton takes the current one, whatever it is given."""

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():  # which sees to it by itself
            return function(*arguments, **options)
        with torch.cuda.device_of(arguments[0]):
            return function(*arguments, **options)

    return run
