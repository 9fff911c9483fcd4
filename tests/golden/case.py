"""One golden case: tensors by role, the reference's settings, and comparison within the tolerance of the index."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


@dataclass
class Case:
    """`params`, `inputs`, `outputs` and `grads` hold the tensors without their prefix."""

    name: str
    config: dict[str, Any]
    params: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    grads: dict[str, Tensor]
    atol: float
    rtol: float
    grad_rtol: float
    rows: str
    gradients: bool

    @classmethod
    def load(cls, directory: Path, name: str, entry: Mapping[str, Any]) -> "Case":
        """Reads `directory/name` with the tolerances of its index entry."""
        roles: dict[str, dict[str, Tensor]] = {"param": {}, "input": {}, "output": {}, "grad": {}}
        with safe_open(directory / name, "pt") as file:
            config = json.loads(file.metadata()["config"])
            for key in file.keys():  # noqa: SIM118 - a file handle, not a dict
                role, _, rest = key.partition(".")
                roles[role][rest] = file.get_tensor(key)
        return cls(
            name,
            config,
            *(roles[role] for role in ("param", "input", "output", "grad")),
            atol=entry["atol"],
            rtol=entry["rtol"],
            grad_rtol=entry["grad_rtol"],
            rows=entry["rows"],
            gradients=entry["gradients"],
        )

    def close(self, what: str, ours: Tensor, theirs: Tensor, real: Tensor | None = None) -> None:
        """Fails with the worst place unless |ours − theirs| ≤ atol + rtol·|theirs|, on rows where `real` holds."""
        assert ours.shape == theirs.shape, f"{what}: shape {list(ours.shape)}, golden {list(theirs.shape)}"
        if real is not None and self.rows == "real":
            ours, theirs = ours[real.bool()], theirs[real.bool()]
        self._within(what, ours, theirs, self.atol + self.rtol * theirs.abs())

    def close_gradients(self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
        """Fails unless every golden gradient is met within grad_rtol of its largest entry."""
        if not self.gradients:
            return
        assert theirs, f"{self.name}: the index promises gradients, the file has none"
        for name, gradient in theirs.items():
            assert name in ours, f"{self.name}: no gradient for {name}"
            bound = self.grad_rtol * gradient.abs().max()
            self._within(f"gradient of {name}", ours[name], gradient, bound.expand_as(gradient))

    def _within(self, what: str, ours: Tensor, theirs: Tensor, bound: Tensor) -> None:
        error = (ours.double() - theirs.double()).abs()
        excess = torch.where(error.isnan(), torch.inf, error / bound.clamp(min=1e-30))
        if excess.numel() and excess.max() > 1:
            place = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
            raise AssertionError(
                f"{self.name}: {what} at {place}: ours {ours[place].item():.8g}, golden {theirs[place].item():.8g}, "
                f"{excess.max().item():.3g} times the tolerance"
            )
