"""The whole evaluation of a model directory, as `farspan eval` runs and saves it."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from farspan.data import _files
from farspan.data.tokenizers import tokenizer_hash
from farspan.errors import ConfigError, DataError
from farspan.evaluation import context_length as protocols_
from farspan.evaluation.baselines import Baseline, baselines
from farspan.evaluation.context_length import PROTOCOLS, Cell
from farspan.evaluation.environment import versions
from farspan.evaluation.loading import load_model, load_tokenizer, read_run, trained_length
from farspan.evaluation.perplexity import BitsPerByte, bits_per_byte
from farspan.evaluation.plan import Plan, make_plan
from farspan.evaluation.scoring import Scorer

if TYPE_CHECKING:
    from farspan.data.dataset import PreparedDataset
    from farspan.models import FarspanForCausalLM

FOLDER = "evaluation"
RESULTS = "evaluation.json"
Stage = Callable[[str, int], Callable[[int], None]]
"""Called with the name of a stage and its size (the tokens it will read); returns what to call as it goes on."""


@dataclass(frozen=True)
class ContextLengths:
    """What was measured by context length, and on what.

    Attributes:
        trained_length: sequence length of training.
        texts: number of texts.
        text_length: tokens of each text.
        kind: `documents`, each cut to `text_length`, or `concatenated documents`.
        stride: step of the sliding window.
        suffix_tokens: scored tokens per text in the suffix protocol.
        sliding, position, suffix: cells by protocol, empty where it was not asked for.
        carried: the cell of the carried state, None where it was not asked for or the memory grows with the text.
    """

    trained_length: int
    texts: int
    text_length: int
    kind: str
    stride: int
    suffix_tokens: int
    sliding: list[Cell]
    position: list[Cell]
    suffix: list[Cell]
    carried: Cell | None


@dataclass(frozen=True)
class Evaluation:
    """Everything one evaluation found.

    Attributes:
        command: the command line, "" when run from Python.
        versions: of what the result depends on.
        model: directory, parameters, mixers, trained length.
        data: corpus, fingerprint, tokenizer, split and its size.
        bits: bits per byte, as `evaluation.perplexity` defines it.
        baselines: on the same split; empty when not asked for.
        context: perplexity by context length.
        device: where it ran.
        dtype: autocast dtype.
        seconds: how long it took.
    """

    command: str
    versions: dict[str, str]
    model: dict[str, Any]
    data: dict[str, Any]
    bits: BitsPerByte
    baselines: list[Baseline]
    context: ContextLengths
    device: str
    dtype: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; inf and NaN are written as the texts "inf" and "nan"."""
        bits = {"bits_per_byte": self.bits.bits_per_byte, "perplexity": self.bits.perplexity, **asdict(self.bits)}
        context: dict[str, Any] = asdict(self.context)
        for protocol in ("sliding", "position", "suffix"):
            context[protocol] = [_cell(cell) for cell in getattr(self.context, protocol)]
        context["carried"] = None if self.context.carried is None else _cell(self.context.carried)
        values = {**asdict(self), "bits": bits, "context": context}
        plain: dict[str, Any] = _finite(values)
        return plain

    def save(self, directory: Path) -> Path:
        """Writes `evaluation.json` and the plots to `directory/evaluation`, each file whole or not at all.

        Returns:
            The path of the JSON file.
        """
        from farspan.evaluation.plots import plot_context_lengths

        folder = directory / FOLDER
        with _files.writing(folder):
            folder.mkdir(exist_ok=True)
        for suffix, content in plot_context_lengths(self).items():
            _files.write_bytes(folder / f"context_length.{suffix}", content)
        path = folder / RESULTS
        _files.write_bytes(path, (json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n").encode())
        return path


def evaluate(
    directory: str | Path,
    dataset: "PreparedDataset",
    *,
    split: str = "valid",
    lengths: Sequence[int] = (),
    stride: int | None = None,
    protocols: Sequence[str] = PROTOCOLS,
    max_tokens: int = 500_000,
    max_windows: int | None = None,
    with_baselines: bool = True,
    batch_tokens: int = 8192,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    command: str = "",
    stage: Stage | None = None,
) -> Evaluation:
    """Measures a model directory: bits per byte, baselines, perplexity by context length.

    Args:
        directory: a model directory.
        dataset: a prepared dataset, made with the model's tokenizer.
        split: the split to read.
        lengths: context lengths; empty for ¼ to 8 times the trained length, as far as data and budget allow.
        stride: step of the sliding window; None is 512, or the trained length where that is shorter.
        protocols: what to measure by context length; see `evaluation.context_length`.
        max_tokens: tokens to read for the context lengths; decides how many texts.
        max_windows: windows to read for bits per byte, spread evenly; None reads the whole split.
        with_baselines: whether to measure the baselines too.
        batch_tokens: tokens per forward pass.
        device: where to run.
        dtype: autocast dtype; None runs in the float32 of the weights.
        command: recorded in the result.
        stage: reports progress.

    Returns:
        The result; `Evaluation.save` writes it.

    Raises:
        FarspanError: for a directory, dataset or option that cannot be used.
    """
    started = time.perf_counter()
    stage = stage or (lambda name, tokens: lambda read: None)
    if batch_tokens < 1:
        raise ConfigError(f"batch_tokens={batch_tokens} is not accepted; it has to be at least 1.")
    model = load_model(directory, device=device)
    if tokenizer_hash(load_tokenizer(directory)) != dataset.metadata.tokenizer_hash:
        raise DataError(
            f"{dataset.directory} was tokenised by another tokenizer ({dataset.metadata.tokenizer!r}) than that of "
            f"{directory}; give the corpus itself with --data, and it is tokenised anew."
        )
    part = dataset.split(split)
    trained = trained_length(directory, model.config)
    end_of_document = dataset.metadata.end_of_document
    plan = make_plan(
        part,
        trained=trained,
        end_of_document=end_of_document,
        lengths=lengths,
        stride=stride,
        protocols=_possible(protocols, model),
        max_tokens=max_tokens,
    )
    reading = len(part.data.tokens) if max_windows is None else min(len(part.data.tokens), max_windows * trained)
    bits = bits_per_byte(
        model,
        part.documents(),
        window=trained,
        end_of_document=end_of_document,
        batch_tokens=batch_tokens,
        max_windows=max_windows,
        dtype=dtype,
        advance=stage("bits per byte", reading),
    )
    context = measure(Scorer(model, batch_tokens, dtype, stage("context length", plan.tokens)), plan)
    compared: list[Baseline] = []
    if with_baselines:
        advance = stage("baselines", 1)
        compared = baselines(dataset, split)
        advance(1)
    return Evaluation(
        command=command,
        versions=versions(),
        model=_about_model(directory, model, trained),
        data=_about_data(dataset, split),
        bits=bits,
        baselines=compared,
        context=context,
        device=torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
        dtype=str(dtype or torch.float32).removeprefix("torch."),
        seconds=round(time.perf_counter() - started, 1),
    )


def measure(score: Scorer, plan: Plan) -> ContextLengths:
    """Runs the protocols of a plan."""
    wanted, texts = plan.protocols, plan.texts
    sliding, suffix = [], []
    for length in plan.lengths:
        if "sliding" in wanted:
            sliding.append(protocols_.sliding_window(score, texts, length, plan.stride))
        if "suffix" in wanted:
            suffix.append(protocols_.fixed_suffix(score, texts, length, plan.suffix))
    return ContextLengths(
        trained_length=plan.trained,
        texts=len(texts),
        text_length=plan.lengths[-1],
        kind=plan.kind,
        stride=plan.stride,
        suffix_tokens=plan.suffix,
        sliding=sliding,
        position=protocols_.by_position(score, texts) if "position" in wanted else [],
        suffix=suffix,
        carried=protocols_.carried_state(score, texts, plan.trained) if "carried" in wanted else None,
    )


def _possible(protocols: Sequence[str], model: "FarspanForCausalLM") -> list[str]:
    if protocols_.memory_is_bounded(model.config):
        return list(protocols)
    if list(protocols) == ["carried"]:
        raise ConfigError("protocol 'carried' is for models whose memory does not grow with the text; name others.")
    return [protocol for protocol in protocols if protocol != "carried"]


def _about_model(directory: str | Path, model: "FarspanForCausalLM", trained: int) -> dict[str, Any]:
    run = read_run(directory)
    return {
        "name": run.get("name", Path(directory).resolve().name),
        "directory": str(directory),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "mixers": list(model.config.mixers),
        "trained_length": trained,
        "step": run.get("step"),
    }


def _about_data(dataset: "PreparedDataset", split: str) -> dict[str, Any]:
    metadata = dataset.metadata
    return {
        "corpus": metadata.corpus,
        "fingerprint": metadata.fingerprint,
        "tokenizer": metadata.tokenizer,
        "split": split,
        **asdict(metadata.splits[split]),
    }


def _cell(cell: Cell) -> dict[str, Any]:
    return {**asdict(cell), "mean_nll": cell.mean_nll, "perplexity": cell.perplexity}


def _finite(value: Any) -> Any:
    """`value` with the floats that JSON does not know as texts."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
