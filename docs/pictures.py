"""Draws which keys a query sees: one picture per mechanism, computed from the references.

Every mechanism is linear in the values once its norm is left out. With the identity as values, row t of the output is
the weight of every key for query t, so the picture is the mechanism itself, not a sketch of it.

    python docs/pictures.py            writes docs/images/keys_<mechanism>.png
"""

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from farspan.nn.positions import rope_frequencies, rotary_table
from farspan.ops import (
    collinear_attention,
    cosine_attention,
    dilated_attention,
    dynamic_mask_attention,
    metala_attention,
    softmax_attention,
    state_space_duality,
)

LENGTH, HEADS, WIDTH = 64, 2, 16


def _normal(*shape: int) -> Tensor:
    return torch.randn(1, LENGTH, *shape)


def _identity() -> Tensor:
    return torch.eye(LENGTH).reshape(1, LENGTH, 1, LENGTH).expand(-1, -1, HEADS, -1).contiguous()


def _qk() -> tuple[Tensor, Tensor]:
    return _normal(HEADS, WIDTH), _normal(HEADS, WIDTH)


def softmax() -> Tensor:
    return softmax_attention(*_qk(), _identity(), backend="reference")


def softmax_window() -> Tensor:
    return softmax_attention(*_qk(), _identity(), window=12, backend="reference")


def collinear() -> Tensor:
    frequencies, _ = rope_frequencies(WIDTH, {}, LENGTH, LENGTH)
    cos, sin = rotary_table(torch.arange(LENGTH).unsqueeze(0), frequencies)
    q, t = 2 * _normal(HEADS, WIDTH), _normal(HEADS, WIDTH // 2).relu()
    return collinear_attention(q, t, _identity(), cos, sin, backend="reference")


def cosine() -> Tensor:
    return cosine_attention(*_qk(), _identity(), torch.zeros(HEADS), backend="reference")[0]


def metala() -> Tensor:
    q, logits = _qk()
    return metala_attention(q.abs(), logits, _identity(), normalize=False, decay_normalizer=8.0, backend="reference")[0]


def ssd() -> Tensor:
    dt, a = _normal(HEADS), torch.tensor([-0.02, -0.3])
    b, c = _normal(1, WIDTH), _normal(1, WIDTH)
    return state_space_duality(_identity(), dt, a, b, c, backend="reference")[0]


def dilated() -> Tensor:
    patterns = {"segment_lengths": (8, 16, 64), "dilations": (1, 2, 4)}
    return dilated_attention(*_qk(), _identity(), **patterns, backend="reference")


def dynamic_mask() -> Tensor:
    return dynamic_mask_attention(*_qk(), _identity(), 2 * _normal(HEADS), keep=12, backend="reference")


PICTURES: dict[str, Callable[[], Tensor]] = {
    "softmax": softmax,
    "softmax_window": softmax_window,
    "collinear": collinear,
    "cosine": cosine,
    "metala": metala,
    "ssd": ssd,
    "dilated": dilated,
    "dynamic_mask": dynamic_mask,
}


def draw(name: str, directory: Path) -> Path:
    """Writes the picture of one mechanism: |weight| of key s for query t, relative to the row's largest, per head."""
    torch.manual_seed(3)
    weights = PICTURES[name]()[0].transpose(0, 1).abs()
    share = weights / weights.amax(-1, keepdim=True).clamp(min=1e-12)
    figure, axes = plt.subplots(1, HEADS, figsize=(6.4, 3.4), layout="constrained")
    for head, axis in enumerate(axes):
        axis.imshow(share[head].sqrt(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axis.set(title=f"head {head}", xlabel="key", ylabel="query")
    path = directory / f"keys_{name}.png"
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)
    return path


def main() -> None:
    """Draws all pictures into docs/images."""
    directory = Path(__file__).resolve().parent / "images"
    directory.mkdir(exist_ok=True)
    for name in PICTURES:
        print(draw(name, directory))


if __name__ == "__main__":
    main()
