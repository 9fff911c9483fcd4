"""What every operator checks before it computes, and the words it uses when a check fails.

A `Contract` reads one call: each tensor is declared with its layout in letters (`"B T H K"`), the first tensor that
shows a letter binds it, and every later one must agree. The message names the tensor, both shapes by letter, and the
tensor that bound the letter.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.errors import ConfigError, ShapeError
from farspan.ops import varlen


class Contract:
    """Checks the tensors of one operator call against their layouts.

    Args:
        op: name of the operator, put in front of every message.
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self.sizes: dict[str, int] = {}
        self.origin: dict[str, str] = {}
        self.device: torch.device | None = None
        self.first = ""

    def tensor(self, name: str, tensor: Tensor | None, layout: str) -> None:
        """Checks one floating-point tensor; `None` passes.

        Args:
            name: argument name for the message.
            tensor: the tensor, or None when the argument was left out.
            layout: letters separated by blanks, such as `"B T H K"`.

        Raises:
            ShapeError: rank, size, dtype or device differ from the rest of the call.
        """
        if tensor is None:
            return
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ShapeError(f"{self.op}: {name} is {given}; give a floating-point tensor [{self._letters(layout)}].")
        self._place(name, tensor)
        letters = layout.split()
        wanted = [self.sizes.get(letter) for letter in letters]
        fits = tensor.dim() == len(letters) and all(
            want is None or want == have for want, have in zip(wanted, tensor.shape, strict=True)
        )
        if not fits:
            bound = [
                f"{letter}={self.sizes[letter]} (from {self.origin[letter]})"
                for letter in dict.fromkeys(letters)
                if letter in self.sizes
            ]
            where = " with " + ", ".join(bound) if bound else ""
            shape = list(tensor.shape)
            raise ShapeError(f"{self.op}: {name} has shape {shape}; expected [{self._letters(layout)}]{where}.")
        for letter, size in zip(letters, tensor.shape, strict=True):
            self.sizes.setdefault(letter, size)
            self.origin.setdefault(letter, name)

    def rank(self, name: str, tensor: Tensor | None, layouts: Sequence[str]) -> None:
        """Checks a tensor that may have one of several ranks, such as a decay per head or per channel."""
        if tensor is None:
            return
        fitting = [layout for layout in layouts if tensor.dim() == len(layout.split())]
        if not fitting:
            accepted = " or ".join(f"[{self._letters(layout)}]" for layout in layouts)
            raise ShapeError(f"{self.op}: {name} has shape {list(tensor.shape)}; expected {accepted}.")
        self.tensor(name, tensor, fitting[0])

    def mask(self, name: str, mask: Tensor | None, layout: str) -> None:
        """Checks a boolean or integer mask (True or 1 = keep)."""
        if mask is None:
            return
        if mask.is_floating_point():
            raise ShapeError(f"{self.op}: {name} is {mask.dtype}; give a boolean or integer mask, True or 1 = keep.")
        self._place(name, mask)
        wanted = [self.sizes[letter] for letter in layout.split()]
        if list(mask.shape) != wanted:
            raise ShapeError(
                f"{self.op}: {name} has shape {list(mask.shape)}; expected [{self._letters(layout)}] = {wanted}."
            )

    def packed(self, cu_seqlens: Tensor | None) -> int:
        """Checks packed-document boundaries against the sequence length and returns the number of sequences.

        Without boundaries every batch row is one sequence, and B is returned.

        Raises:
            ShapeError: the batch is not 1, or `cu_seqlens` is not int32 `[num_seqs + 1]` rising from 0 to N.
        """
        if cu_seqlens is None:
            return self.sizes["B"]
        if self.sizes["B"] != 1:
            raise ShapeError(
                f"{self.op}: packed documents need batch 1, but {self.first} has B={self.sizes['B']}; "
                "join the rows along the length and describe them in cu_seqlens."
            )
        self._place("cu_seqlens", cu_seqlens)
        varlen.check_cu_seqlens(cu_seqlens, self.sizes["T"], name=f"{self.op}: cu_seqlens")
        return cu_seqlens.numel() - 1

    def choice(self, name: str, value: str | None, accepted: Sequence[str | None]) -> None:
        """Checks a named option."""
        if value not in accepted:
            words = ", ".join(repr(word) for word in accepted)
            raise ConfigError(f"{self.op}: {name}={value!r} is not known. Accepted: {words}.")

    def bind(self, letter: str, size: int, origin: str) -> None:
        """Binds a letter from something other than a tensor's own shape."""
        self.sizes[letter], self.origin[letter] = size, origin

    def _place(self, name: str, tensor: Tensor) -> None:
        if self.device is None:
            self.device, self.first = tensor.device, name
        elif tensor.device != self.device:
            raise ShapeError(
                f"{self.op}: {name} is on {tensor.device}, but {self.first} is on {self.device}; move it there."
            )

    @staticmethod
    def _letters(layout: str) -> str:
        return ", ".join(layout.split())


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype in which an operator accumulates: float64 if any input is float64, otherwise float32."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def changed_in_place(op: str, state: Tensor, *inputs: Tensor) -> None:
    """Checks a state that a decoding step overwrites.

    Raises:
        ShapeError: it is not contiguous, or not of the dtype in which the operator accumulates.
    """
    dtype = compute_dtype(*inputs)
    if state.dtype != dtype or not state.is_contiguous():
        raise ShapeError(
            f"{op}: state is {state.dtype}, contiguous: {state.is_contiguous()}; it is changed in place and has to be "
            f"a contiguous tensor of {dtype}."
        )


def without_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which the tensor's device does not autocast, so that the operator alone decides its dtypes."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)


def plain_backward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the backward of an autograd function: a second derivative raises, and nothing autocasts."""

    @once_differentiable
    @functools.wraps(backward)
    def call(ctx: Any, *gradients: Tensor | None) -> Any:
        given = next(gradient for gradient in gradients if gradient is not None)
        with without_autocast(given):
            return backward(ctx, *gradients)

    @functools.wraps(backward)
    def told(ctx: Any, *gradients: Tensor | None) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # PyTorch refuses where a gradient is differentiated; that what was saved is, it does not see.
            gradients = tuple(
                gradient if gradient is None else gradient.detach().requires_grad_() for gradient in gradients
            )
        return call(ctx, *gradients)

    return told
