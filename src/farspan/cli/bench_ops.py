"""`farspan bench ops`: how fast the operators are on this machine, beside what else is installed."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from farspan.cli import _output
from farspan.cli.bench import origin, parse_shape, write
from farspan.errors import ConfigError, nearest

if TYPE_CHECKING:
    from farspan.evaluation.op_speed import OpSpeed

_OPS = """Measure operators at the sizes of published models, forward and backward, and the peers beside them.

    farspan bench ops
    farspan bench ops metala cosine --shapes 16x2048 1x32768 1x131072 --json speed.json --plot speed.png

Peers: PyTorch (attention by flash and cuDNN, convolution), flash-linear-attention (pip install fla-core), mamba_ssm,
Doge in transformers and released forms, where they run. On a GPU, times are of replayed CUDA graphs, with the
eager time beside them; GB/s counts every input and the output once, TFLOP/s what the formula needs; both are shown with
what a copy and a matrix product reach on this device in the same run."""


@dataclass(kw_only=True)
class _Command:
    operators: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[NAME …]")] = ()
    """Operators to measure; without any, all."""
    shapes: tuple[str, ...] = ()
    """Shapes ROWSxTOKENS; unset, those at which each operator is usually compared on a GPU, 1x1024 on a CPU."""
    peers: bool = True
    """Measure the peers of the operators, too."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the inputs; auto is float32 on the CPU and bfloat16 on a GPU."""
    repeats: int = 20
    """Runs of which the median is taken."""
    cold: bool = False
    """Measure each first call in a process of its own that finds no compiled kernels."""
    tune: bool = False
    """Choose the block sizes of the kernels of training by measuring on this GPU, and keep them in a table."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: Path | None = None
    """Write the figures, with versions, device and this command, to this file."""
    plot: Path | None = None
    """Draw forward and backward over the shapes into this file (.png, .svg or .pdf)."""


def run(argv: list[str]) -> int:
    """Runs `farspan bench ops`; arguments and results as `farspan.cli.bench.run`."""
    options = tyro.cli(_Command, args=argv[1:], prog="farspan bench ops", description=_OPS)
    if options.repeats < 1:
        raise ConfigError(f"repeats={options.repeats} is not accepted; it has to be at least 1.")
    if options.plot is not None and options.plot.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot {options.plot} has to end in .png, .svg or .pdf.")

    import torch

    from farspan.evaluation.loading import choose_device
    from farspan.evaluation.op_cases import chosen
    from farspan.evaluation.op_speed import ceilings, op_speed

    device = choose_device(options.device)
    gpu = device.type == "cuda"
    dtype = getattr(torch, {"auto": "bfloat16" if gpu else "float32"}.get(options.dtype, options.dtype))
    cases = chosen(options.operators, options.peers)
    asked = [parse_shape(text) for text in options.shapes]
    if any(extra for _, _, extra in asked):
        raise ConfigError("+checkpoint is for training steps; leave it out of --shapes.")
    places = [(rows, tokens) for rows, tokens, _ in asked] or ([] if gpu else [(1, 1024)])
    todo = [(name, case, place) for name, case in cases.items() for place in places or case.shapes]
    if options.tune:
        return _tune(options.operators, dtype, device)
    limits = ceilings(device, dtype)
    speeds = []
    with _output.progress() as display:
        task = display.add_task("measuring", total=len(todo))
        for name, case, (rows, tokens) in todo:
            display.update(task, description=f"{name} {rows}x{tokens}")
            speeds.append(op_speed(name, case, rows, tokens, dtype, device, options.repeats, options.cold))
            display.advance(task)
    _show(speeds, limits)
    if options.json is not None:
        rows_ = [dataclasses.asdict(speed) for speed in speeds]
        found = {
            **origin(argv, device),
            "dtype": str(dtype).removeprefix("torch."),
            "ceilings": limits,
            "speeds": rows_,
        }
        write(options.json, (json.dumps(found, indent=2) + "\n").encode())
    if options.plot is not None:
        write(options.plot, _drawing(speeds, options.plot.suffix[1:]))
    return 0


def _tune(names: tuple[str, ...], dtype: Any, device: Any) -> int:
    import torch

    from farspan.evaluation.op_tune import TUNED, tune
    from farspan.ops import _tiles

    if device.type != "cuda":
        raise ConfigError(f"--tune measures kernels, which run on NVIDIA GPUs only; the device is {device}.")
    for name in names:
        if name not in TUNED:
            raise ConfigError(f"{name!r} has no block sizes to tune: {nearest(name, TUNED)}")
    index = torch.cuda.current_device() if device.index is None else device.index
    table = _output.figures("kernel", "tile", numbers=["time"], title="time relative to the shipped tile")

    def report(key: str, tile: Any, ratio: float) -> None:
        table.add_row(key, " ".join(map(str, tile)), f"{ratio:.3f}")

    found = tune(names or TUNED, dtype, device, report)
    path, card = _tiles.place(index), torch.cuda.get_device_name(index)
    write(path, _tiles.table(_tiles.read(path, card) | found, card))
    _output.out.print(table)
    _output.message(f"{path}: {len(found)} tiles are faster than the shipped ones", style="dim")
    return 0


def _show(speeds: "list[OpSpeed]", limits: dict[str, float]) -> None:
    copy, product = limits.values()
    columns = ("forw.\nms", "both\nms", "eager\nms", "\nGB/s", "TFLOP\n/s", "extra\nGiB", "laun-\nches", "first\ns")
    table = _output.figures("\noperator", "\nshape", numbers=columns)
    table.caption = f"both: forward and backward. A copy: {copy:,.0f} GB/s; a matrix product: {product:,.2f} TFLOP/s"
    for speed in speeds:
        place = f"{speed.rows}x{speed.tokens}"
        if speed.forward_ms is None:
            table.add_row(speed.operator, place, *[""] * len(columns))
            _output.message(f"{speed.operator} {place}: {speed.note}", style="dim")
            continue
        values: list[Any] = [
            _number(speed.forward_ms, 3),
            _number(speed.both_ms, 3),
            _number(speed.eager_ms, 3),
            _number(speed.gigabytes_per_second, 0),
            _number(speed.teraflops_per_second, 2),
            _number(speed.extra_gib, 2),
            _number(speed.launches, 0),
            _number(speed.first_call_s, 2),
        ]
        table.add_row(speed.operator, place, *values)
        if speed.note:
            _output.message(f"{speed.operator} {place}: {speed.note}", style="dim")
    _output.out.print(table)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _drawing(speeds: "list[OpSpeed]", form: str) -> bytes:
    """Milliseconds per 1,000 tokens, forward and backward, over the length of a row."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(speed.operator for speed in speeds):
        points = sorted(
            (speed.tokens, 1000 * speed.both_ms / (speed.rows * speed.tokens))
            for speed in speeds
            if speed.operator == name and speed.both_ms is not None
        )
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("tokens per row")
    axes.set_ylabel("forward + backward, ms per 1,000 tokens")
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, dpi=120)
    return buffer.getvalue()
