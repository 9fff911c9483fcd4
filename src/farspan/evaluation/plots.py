"""The plot of perplexity by context length."""

import io
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from farspan.evaluation.context_length import Cell
    from farspan.evaluation.evaluate import Evaluation


def plot_context_lengths(evaluation: "Evaluation") -> dict[str, bytes]:
    """Perplexity by window and by position, as the contents of a PNG and an SVG file.

    Returns:
        `{"png": ..., "svg": ...}`; cells that are not finite are left out of the curves.
    """
    from matplotlib.figure import Figure

    context = evaluation.context
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _curve(left, context.sliding, [cell.length for cell in context.sliding], f"sliding window, stride {context.stride}")
    _curve(left, context.suffix, [cell.length for cell in context.suffix], f"last {context.suffix_tokens} tokens")
    if context.carried is not None and math.isfinite(context.carried.perplexity):
        left.axhline(context.carried.perplexity, color="tab:green", linestyle=":", label="state carried over windows")
    _curve(right, context.position, [cell.length for cell in context.position], "mean since the mark before")
    for axes, what in ((left, "context length (tokens)"), (right, "position in the text (tokens)")):
        axes.axvline(context.trained_length, color="gray", linestyle="--", linewidth=1, label="trained length")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel(what)
        axes.set_ylabel("perplexity per token")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{evaluation.model['name']}: {context.texts} {context.kind} of {context.text_length:,} tokens")
    return {form: _render(figure, form) for form in ("png", "svg")}


def _curve(axes: Any, cells: "list[Cell]", places: list[int], label: str) -> None:
    points = [(x, cell.perplexity) for x, cell in zip(places, cells, strict=True) if math.isfinite(cell.perplexity)]
    if points:
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
        low, high = min(y for _, y in points), max(y for _, y in points)
        if high > 10 * low:
            axes.set_yscale("log")


def _render(figure: Any, form: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, dpi=120)
    return buffer.getvalue()
