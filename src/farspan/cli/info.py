"""`farspan info`: what this machine offers, or what a model directory holds."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.table import Table

from farspan.cli import _output
from farspan.errors import CheckpointError, nearest

if TYPE_CHECKING:
    from farspan.models.modeling import FarspanPreTrainedModel

_DESCRIPTION = """Show versions, devices, operators with their backends (and why one is unavailable), mixers and
feed-forwards; or, given a model directory, describe the model: its layers, parameters, memory and cost.

    farspan info
    farspan info runs/demo --json"""

_LENGTHS = (1024, 8192, 65_536, 1_048_576)


@dataclass(kw_only=True)
class _Command:
    directory: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="DIR")] = None
    """A model directory; without one, this machine."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print JSON instead of tables."""


def run(argv: list[str]) -> int:
    """Runs `farspan info`.

    Args:
        argv: The arguments after `info`.

    Returns:
        0 when everything was shown.

    Raises:
        FarspanError: What the user can mend.
        SystemExit: From the argument parser, after it has printed help (0) or a message (2).
    """
    options = tyro.cli(_Command, args=argv, prog="farspan info", description=_DESCRIPTION)
    found = describe_machine() if options.directory is None else describe_model(options.directory)
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    show = _show_machine if options.directory is None else _show_model
    show(found)
    return 0


def describe_machine() -> dict[str, Any]:
    """Versions, devices, backends of each operator, and the registered building blocks."""
    from farspan import ops
    from farspan.evaluation import environment
    from farspan.mixers.base import MIXERS
    from farspan.nn.feed_forward import FEED_FORWARDS

    mixers: dict[str, dict[str, Any]] = {}
    for name in MIXERS.names():
        mixer, options = MIXERS.get(name)
        mixers[name] = {
            "operators": list(mixer.operators),
            "cache": mixer.cache_kind(options()),
            "bidirectional": mixer.bidirectional,
            "shards": mixer.shards,
        }
    operators = ops.availability()  # mixers have registered theirs by now
    for about in mixers.values():
        needed = [operators.get(name, {}) for name in about["operators"]]
        about["backends"] = {
            backend: next((reason for backends in needed if (reason := backends.get(backend))), None)
            for backend in ("reference", "torch", "triton")
            if needed
        }
    return {
        "versions": environment.versions(),
        "cpu": environment.processor(),
        "gpus": environment.gpus(),
        "operators": operators,
        "mixers": mixers,
        "feed_forwards": FEED_FORWARDS.names(),
    }


def describe_model(directory: Path) -> dict[str, Any]:
    """What a model directory holds; the weights are not read.

    Raises:
        CheckpointError: when it is not one.
    """
    from farspan.evaluation.loading import check_model_directory, load_config, read_run, trained_length

    check_model_directory(directory)  # a mistake in the directory is said at once

    import torch

    import farspan.models
    from farspan.models import FarspanForCausalLM
    from farspan.models.blocks import FarspanBlock
    from farspan.models.decoding import growing_memories

    config = load_config(directory)
    architecture = (config.architectures or ["FarspanForCausalLM"])[0]
    if architecture not in farspan.models.__all__:
        known = nearest(architecture, farspan.models.__all__)
        raise CheckpointError(f"{directory}/config.json names the architecture {architecture!r}: {known}")
    with torch.device("meta"):
        model = getattr(farspan.models, architecture)(config)
    writes = isinstance(model, FarspanForCausalLM)
    trained, run = trained_length(directory, config), read_run(directory)
    lengths = sorted({trained, *_LENGTHS})
    dtype = getattr(torch, str(config.dtype or "float32").removeprefix("torch."))
    blocks = [module.mixer for module in model.modules() if isinstance(module, FarspanBlock)]
    return {
        "directory": str(directory),
        "architecture": architecture,
        "name": run.get("name", directory.resolve().name),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "dtype": str(dtype).removeprefix("torch."),
        "layers": [
            {"mixer": mixer, "cache": kind, "feed_forward": feed_forward}
            for mixer, kind, feed_forward in zip(config.mixers, config.layer_types, config.feed_forwards, strict=True)
        ],
        "parameters": count_parameters(model),
        "trained_length": trained,
        "grows_while_decoding": growing_memories(model) if writes else None,
        "cache_bytes": {
            length: sum(mixer.state_bytes(length, dtype) for mixer in blocks) if writes else None for length in lengths
        },
        "flops_per_token": {length: model.flops_per_token(length) for length in lengths},
        "trained_on": {
            name: run[name] for name in ("corpus", "step", "tokens", "bits_per_byte", "versions") if name in run
        },
    }


def count_parameters(model: "FarspanPreTrainedModel") -> dict[str, int]:
    """Parameters by part; a head that is the embedding counts once, as embedding."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = next(part for key, part in _PARTS.items() if key in name)
        counts[part] = counts.get(part, 0) + parameter.numel()
    return {**counts, "total": sum(counts.values())}


_PARTS = {
    ".mixer.": "mixers",
    ".feed_forward.": "feed-forwards",
    "norm": "norms",
    "residual": "norms",
    "embed": "embedding",
    "": "head",
}


def _show_machine(found: dict[str, Any]) -> None:
    cpu = found["cpu"]
    bfloat16 = ", ".join(cpu["bfloat16"]) or "emulated"
    gpus = [
        f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, compute capability {gpu['capability']}"
        for gpu in found["gpus"]
    ]
    rows = {**found["versions"], "cpu": f"{cpu['model']}, {cpu['cores']} cores, bfloat16: {bfloat16}"}
    _rows({**rows, "gpu": "; ".join(gpus) or "none"})
    table = _table("operator", "reference", "torch", "triton")
    for operator, backends in found["operators"].items():
        table.add_row(operator, *(reason or "yes" for reason in backends.values()))
    _output.out.print(table)
    table = _table("mixer", "operators", "backends", "memory while decoding")
    table.columns[1].no_wrap = True
    for name, mixer in found["mixers"].items():
        table.add_row(
            name,
            "\n".join(mixer["operators"]),
            ", ".join(backend for backend, reason in mixer["backends"].items() if reason is None),
            _MEMORY[mixer["cache"]],
        )
    _output.out.print(table)
    _rows({"feed-forwards": ", ".join(found["feed_forwards"])})


_MEMORY = {
    "kv": "keys and values: grows",
    "window": "some keys and values: bounded",
    "state": "state: constant",
    "state+kv": "state, keys and values: grows",
}


def _show_model(found: dict[str, Any]) -> None:
    kinds: dict[str, list[int]] = {}
    for number, layer in enumerate(found["layers"]):
        kinds.setdefault(f"{layer['mixer']} + {layer['feed_forward']}", []).append(number)
    rows = {
        "model": f"{found['name']} ({found['directory']}), {found['dtype']}",
        "layers": "; ".join(f"{kind}: {_ranges(numbers)}" for kind, numbers in kinds.items()),
        "width": f"{found['hidden_size']}, {found['vocab_size']:,} tokens in the vocabulary",
        "parameters": ", ".join(f"{part} {count:,}" for part, count in found["parameters"].items()),
        "trained length": f"{found['trained_length']:,} tokens",
    }
    trained_on = found["trained_on"]
    if corpus := trained_on.get("corpus"):
        rows["trained on"] = f"{corpus['name']} ({corpus['tokenizer']}, fingerprint {corpus['fingerprint'][:12]})"
    if "step" in trained_on:
        rows["training"] = f"{trained_on['step']:,} steps, {trained_on['tokens']:,} tokens"
    if trained_on.get("bits_per_byte"):
        rows["bits per byte"] = f"{trained_on['bits_per_byte']:.4f} on the valid split"
    growing = found["grows_while_decoding"]
    if growing is None:
        rows["decoding"] = f"none: {found['architecture']} writes no text"
    elif growing:
        rows["decoding"] = f"step by step (the memory of {', '.join(growing)} does not stay in one place)"
    else:
        rows["decoding"] = "on a GPU one captured CUDA graph a token, on the CPU step by step"
    _rows(rows)
    table = _table("context length", "memory while decoding", "forward FLOP per token")
    for length, size in found["cache_bytes"].items():
        table.add_row(f"{length:,}", "" if size is None else _bytes(size), f"{found['flops_per_token'][length]:.3g}")
    _output.out.print(table)


def _rows(rows: dict[str, str]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", value)
    _output.out.print(table, highlight=False)


def _table(*columns: str) -> Table:
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=number == 0)
    return table


def _ranges(numbers: list[int]) -> str:
    """Numbers as ranges: 0–2, 4, 6–7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("–".join(map(str, part)) for part in parts)


def _bytes(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
