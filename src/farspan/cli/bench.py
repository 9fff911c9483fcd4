"""`farspan bench`: how fast models train and decode on this machine."""

import dataclasses
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from farspan.cli import _output
from farspan.errors import ConfigError, nearest

_MODEL = """Measure a model with random weights: training steps, and decoding behind contexts of some lengths.

    farspan bench model metala-3m --train 8x512 --decode 1x512 --json speed.json
    farspan bench model metala-374m --train 16x2048 1x32768+checkpoint --decode 8x2048 8x131072 --compile

A shape is ROWSxTOKENS; +checkpoint recomputes every layer in the backward pass. Training runs in float32 with AdamW,
on a GPU under bfloat16 autocast; decoding runs in --dtype and samples from 95 % of the probability."""


@dataclass(kw_only=True)
class _Model:
    preset: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PRESET")]
    """Name of a preset; a wrong one shows the nearest."""
    train: tuple[str, ...] = ()
    """Shapes of training steps."""
    decode: tuple[str, ...] = ()
    """Rows, and tokens read before decoding."""
    steps: int = 8
    """Training steps to time; three are run before."""
    tokens: int = 64
    """Tokens to decode; the first five are not counted."""
    loops: tuple[Literal["captured", "eager", "generate"], ...] = ()
    """Loops to decode in, each behind a context that is read anew; all that the model can take by default."""
    compile: bool = False
    """Train under torch.compile."""
    llama: bool = False
    """Train LLaMA of transformers in the same width, depth and vocabulary as well."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights while decoding; auto is float32 on the CPU and bfloat16 on a GPU."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: Path | None = None
    """Write the figures, with versions, device and this command, to this file."""


def run(argv: list[str]) -> int:
    """Runs `farspan bench <what>`.

    Args:
        argv: The arguments after `bench`.

    Returns:
        0 when everything was measured.

    Raises:
        FarspanError: What the user can mend.
        SystemExit: From the argument parser, after it has printed help (0) or a message (2).
    """
    if not argv or argv[0] in ("-h", "--help"):
        for line in ("model PRESET  training, prefill and decoding", "ops [NAME …]  operators and peers"):
            _output.out.print(f"usage: farspan bench {line}", highlight=False, markup=False)
        return 0 if argv else 2
    if argv[0] == "ops":
        from farspan.cli.bench_ops import run as run_ops

        return run_ops(argv)
    if argv[0] != "model":
        return _output.fail(f"unknown command 'bench {argv[0]}': {nearest(argv[0], ['model', 'ops'])}")
    options = tyro.cli(_Model, args=argv[1:], prog="farspan bench model", description=_MODEL)
    return _bench_model(options, argv)


def parse_shape(text: str) -> tuple[int, int, bool]:
    """`"16x2048"` → rows, tokens, and whether `+checkpoint` follows.

    Raises:
        ConfigError: for anything else.
    """
    shape, _, extra = text.partition("+")
    rows, cross, tokens = shape.partition("x")
    if not (cross and rows.isdecimal() and tokens.isdecimal() and int(rows) and int(tokens)) or extra not in (
        "",
        "checkpoint",
    ):
        raise ConfigError(f"{text!r} is no shape; write ROWSxTOKENS such as 16x2048, or 1x32768+checkpoint.")
    return int(rows), int(tokens), bool(extra)


def _bench_model(options: _Model, argv: Sequence[str]) -> int:
    from farspan.models import presets

    shapes = [parse_shape(text) for text in options.train], [parse_shape(text) for text in options.decode]
    if not any(shapes):
        raise ConfigError("there is nothing to measure; name shapes with --train or --decode.")
    if any(checkpointed for _, _, checkpointed in shapes[1]):
        raise ConfigError("decoding has no backward pass; leave +checkpoint out of --decode.")
    preset = presets.get(options.preset)
    if not preset.causal or (preset.architectures or ["FarspanForCausalLM"]) != ["FarspanForCausalLM"]:
        raise ConfigError(f"the preset {options.preset} is no language model that writes text; choose one that is.")

    import torch

    from farspan.evaluation.loading import choose_device
    from farspan.models import FarspanForCausalLM
    from farspan.training.speed import FEWEST_TOKENS

    for name, value, least in (("steps", options.steps, 1), ("tokens", options.tokens, FEWEST_TOKENS)):
        if value < least:
            raise ConfigError(f"{name}={value} is not accepted; it has to be at least {least}.")

    device = choose_device(options.device)
    results: dict[str, Any] = {**origin(argv, device), "training": [], "decoding": []}
    makers: dict[str, Callable[[], Any]] = {options.preset: lambda: FarspanForCausalLM(preset)}
    if options.llama:
        makers["transformers LLaMA"] = lambda: _llama(preset)

    def record(kind: str, name: str, speed: Any, text: str) -> None:
        """Tells and keeps each figure as soon as it is known: others may take long, or more than there is."""
        results[kind].append({"model": name, **dataclasses.asdict(speed)})
        _output.message(f"{name} {text}", style="dim")
        if options.json is not None:
            write(options.json, (json.dumps(results, indent=2) + "\n").encode())

    for name, make in makers.items():
        _train(name, make, shapes[0], options, device, record)
    if shapes[1]:
        dtype = {"auto": "bfloat16" if device.type == "cuda" else "float32"}.get(options.dtype, options.dtype)
        with torch.device(device):
            model = FarspanForCausalLM(preset).to(getattr(torch, dtype)).eval()
        _decode(options.preset, model, shapes[1], options, record)
    _show(results)
    return 0


def origin(argv: Sequence[str], device: Any) -> dict[str, Any]:
    """What figures depend on: the command, versions and the device."""
    from farspan.evaluation.environment import gpus, processor, versions

    return {
        "command": shlex.join(["farspan", "bench", *argv]),
        "versions": versions(),
        "device": gpus()[device.index or 0] if device.type == "cuda" else processor(),
    }


def write(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, and the directories above it."""
    from farspan.data import _files

    with _files.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    _files.write_bytes(path, content)


def _train(
    name: str,
    make: Callable[[], Any],
    shapes: list[tuple[int, int, bool]],
    options: _Model,
    device: Any,
    record: Callable[[str, str, Any, str], None],
) -> None:
    import torch

    from farspan.training.speed import training_speed

    for rows, tokens, checkpointed in shapes:
        with torch.device(device):
            model = make()
        torch.compiler.reset()
        speed = training_speed(
            model, rows, tokens, compiled=options.compile, checkpointed=checkpointed, steps=options.steps
        )
        record("training", name, speed, f"{rows}x{tokens}: {speed.tokens_per_second:,.0f} tokens/s")
        del model


def _decode(
    name: str,
    model: Any,
    shapes: list[tuple[int, int, bool]],
    options: _Model,
    record: Callable[[str, str, Any, str], None],
) -> None:
    from farspan.training.speed import decoding_speed

    for rows, context, _ in shapes:
        for speed in decoding_speed(model, rows, context, tokens=options.tokens, loops=options.loops):
            record("decoding", name, speed, f"{rows}x{context} {speed.loop}: {speed.ms_per_token:.3f} ms/token")


def _llama(config: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.hidden_size // 64,
            attn_implementation="sdpa",
        )
    )


def _show(results: dict[str, Any]) -> None:
    if results["training"]:
        columns = ["\ntokens/s", "\nms/step", "peak\nGiB", "first\nstep s"]
        table = _output.figures("\nmodel", "\nshape", "\nhow", numbers=columns, title="training")
        for row in results["training"]:
            how = [word for word, on in (("compiled", row["compiled"]), ("checkpointed", row["checkpointed"])) if on]
            table.add_row(
                row["model"],
                f"{row['batch']}x{row['length']}",
                ", ".join(how) or "eager",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['step_ms']:.1f}",
                "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}",
                f"{row['first_step_s']:.1f}",
            )
        _output.out.print(table)
    if results["decoding"]:
        columns = ["\nrows", "\ncontext", "\nms/token", "prefill\ns", "memory\nMiB"]
        table = _output.figures("\nmodel", "\nloop", numbers=columns, title="decoding")
        for row in results["decoding"]:
            table.add_row(
                row["model"],
                row["loop"],
                str(row["batch"]),
                f"{row['context']:,}",
                f"{row['ms_per_token']:.3f}",
                f"{row['prefill_s']:.2f}",
                f"{row['cache_bytes'] / 2**20:.1f}",
            )
        _output.out.print(table)
