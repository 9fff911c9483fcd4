"""Line plots as SVG text, ready to stand inside an HTML page: no file, no display, no address in them."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

BLUE, ORANGE, GREEN, GREY = "#2459d3", "#d9622b", "#1d8a5f", "#8b93a1"
_POINTS = 600  # more are not visible at this size


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    Args:
        x: Horizontal values.
        y: Vertical values, as many; NaN leaves a gap.
        label: Name in the legend; empty for none.
        color: Its colour.
        faint: Draw it thin and pale, as the raw data behind a smoothed line.
        dots: Mark the points, for few measurements.
    """

    x: Sequence[float]
    y: Sequence[float]
    label: str = ""
    color: str = BLUE
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Plot:
    """A plot with one pair of axes.

    Args:
        title: What is shown, with its unit.
        lines: The lines.
        x_label: Name of the horizontal axis.
        log_x: Logarithmic (base 2) horizontal axis.
        start_at_zero: Let the vertical axis begin at 0.
        marks: Vertical lines at these places, with their labels.
    """

    title: str
    lines: Sequence[Line]
    x_label: str = "step"
    log_x: bool = False
    start_at_zero: bool = False
    marks: dict[float, str] = field(default_factory=dict)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of the `window` values up to each one (fewer at the beginning)."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    starts = [max(0, end - window) for end in range(1, len(sums))]
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, 1)]


def svg(plot: Plot, width: float = 6.2, height: float = 2.9) -> str:
    """Draws a plot and returns its `<svg>` element.

    Args:
        plot: What to draw.
        width: Width in inches of 72 points.
        height: Height.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",  # text stays text, in the font of the page
        "svg.hashsalt": plot.title,  # ids that are stable, and different in every plot of a page
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": "#1c2430",
        "axes.labelcolor": "#5b6472",
        "xtick.color": "#5b6472",
        "ytick.color": "#5b6472",
        "axes.edgecolor": "#c9ced6",
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        _draw(figure.add_subplot(), plot)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    # The prolog, the metadata and the namespaces only name places on the web; HTML needs none of them.
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)
    return re.sub(r'width="[^"]*" height="[^"]*"|height="[^"]*" width="[^"]*"', 'role="img"', text, count=1)


def _draw(axes: Any, plot: Plot) -> None:
    for line in plot.lines:
        stride = max(1, len(line.x) // _POINTS)
        axes.plot(
            line.x[::stride],
            line.y[::stride],
            label=line.label or None,
            color=line.color,
            alpha=0.28 if line.faint else 1.0,
            linewidth=0.8 if line.faint else 1.7,
            marker="o" if line.dots else None,
            markersize=4,
        )
    for place, label in plot.marks.items():
        axes.axvline(place, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            label,
            (place, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            color=GREY,
            va="top",
            fontsize=8,
        )
    if plot.log_x:
        axes.set_xscale("log", base=2)
        ticks = sorted({x for line in plot.lines for x in line.x})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    if plot.start_at_zero:
        axes.set_ylim(bottom=0)
    else:
        _leave_out_the_first_fall(axes, plot)
    axes.set_title(plot.title, loc="left", fontsize=10, fontweight="bold", pad=8)
    axes.set_xlabel(plot.x_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e9ee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.margins(x=0.015)
    if any(line.label for line in plot.lines):
        axes.legend(frameon=False, fontsize=8, handlelength=1.4)


def _leave_out_the_first_fall(axes: Any, plot: Plot) -> None:
    """Cuts the top where a few early values, such as the loss of an untrained model, would flatten all the rest."""
    values = sorted(y for line in plot.lines for y in line.y if y == y and abs(y) != float("inf"))
    if len(values) < 50:
        return
    low, high = values[0], values[int(0.97 * len(values))]
    if values[-1] - low > 1.6 * (high - low) > 0:
        axes.set_ylim(low - 0.08 * (high - low), high + 0.25 * (high - low))
