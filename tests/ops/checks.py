"""What the operator tests share: calling with gradients, comparing with a message that shows the worst entry."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Named = dict[str, Tensor | None]


def assert_close(
    got: Tensor, want: Tensor, tolerance: float, name: str = "output", *, largest: Tensor | None = None
) -> None:
    """Fails when an entry is off by more than tolerance times the largest; shows its index, both values, the ratio.

    `largest` replaces the largest entry of `want` where the value is a difference of larger terms.
    """
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)} instead of {list(want.shape)}"
    if got.numel() == 0:
        return
    assert bool(torch.isfinite(got).all()), f"{name}: not finite"
    got, want = got.detach().double(), want.detach().double()
    error = (got - want).abs()
    largest = torch.maximum(want.abs().max(), torch.zeros(()) if largest is None else largest).clamp(min=1e-30)
    worst = int(error.argmax())
    ratio = float(error.flatten()[worst] / largest)
    place = [int(i) for i in torch.unravel_index(torch.tensor(worst), got.shape)]
    message = f"{name}: worst at {place}: {got.flatten()[worst]:.9g} instead of {want.flatten()[worst]:.9g}"
    assert ratio <= tolerance, f"{message}; {ratio:.3g} of the largest entry, allowed {tolerance:.3g}"


def outputs_and_gradients(call: Callable[..., Any], tensors: Named) -> dict[str, Tensor]:
    """Calls `call(**tensors)` for `(out, state)` and differentiates a fixed weighting of both by every tensor."""
    leaves = {name: x if x is None else x.detach().clone().requires_grad_() for name, x in tensors.items()}
    out, state = call(**leaves)
    generator = torch.Generator().manual_seed(11)
    total = torch.zeros((), dtype=torch.float64)
    for result in (out, state):
        weight = torch.randn(result.shape, generator=generator, dtype=torch.float64)
        total = total + (result.double() * weight).sum()
    total.backward()
    results = {"out": out.detach(), "state": state.detach()}
    for name, leaf in leaves.items():
        if leaf is not None:
            results["d_" + name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return results


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Compares all outputs and gradients."""
    assert got.keys() == want.keys()
    for name in want:
        # The decay's gradient sums differences of q dq and k dk.
        terms = want["d_q"].abs().max() if name == "d_log_decay" and want["d_q"].numel() else None
        assert_close(got[name], want[name], tolerance, name, largest=terms)


def cast(tensors: Named, dtype: torch.dtype) -> Named:
    """All tensors in another dtype."""
    return {name: None if x is None else x.to(dtype) for name, x in tensors.items()}


def boundaries(lengths: Sequence[int]) -> Tensor:
    """`cu_seqlens` of the given lengths."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
