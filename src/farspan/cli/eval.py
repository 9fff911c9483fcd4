"""`farspan eval`: bits per byte and perplexity by context length of a model directory."""

import contextlib
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from farspan.cli import _output
from farspan.errors import DataError

if TYPE_CHECKING:
    from farspan.data.dataset import PreparedDataset
    from farspan.evaluation.evaluate import Evaluation, Stage

_DESCRIPTION = """Measure a model directory: bits per byte next to two baselines, and perplexity by context length.

    farspan eval runs/demo
    farspan eval runs/demo --data 'books/**/*.txt' --lengths 512 2048 8192 --protocols sliding

Protocols: sliding (window with a stride, each token scored once), position (mean by position in long texts), suffix
(the last tokens after longer prefixes), carried (the state carried over windows; only for models whose memory does not
grow). Results go to DIR/evaluation as JSON and plots; the report of a run is refreshed."""

Protocol = Literal["sliding", "position", "suffix", "carried"]


@dataclass(kw_only=True)
class _Command:
    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """A model directory, such as a run of farspan train."""
    data: str | None = None
    """A prepared dataset, or a corpus by name or path; unset, the dataset that the run was trained on."""
    split: str = "valid"
    """The split to read: train, valid or test."""
    lengths: tuple[int, ...] = ()
    """Context lengths in tokens; unset, a quarter to 8 times the trained length, as data and --max-tokens allow."""
    stride: int | None = None
    """Step of the sliding window in tokens; unset, 512, or the trained length where that is shorter."""
    protocols: tuple[Protocol, ...] = ("sliding", "position", "suffix", "carried")
    """What to measure by context length."""
    max_tokens: int = 500_000
    """Tokens to read for the context lengths; decides how many texts are read."""
    max_windows: int | None = None
    """Windows to read for bits per byte, spread evenly over the split; unset, all of it."""
    baselines: bool = True
    """Measure the baselines on the same split (kept with the dataset, so that a second time costs nothing)."""
    batch_tokens: int = 8192
    """Tokens per forward pass."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the layers; the head and the losses are float32 in any case."""


def run(argv: list[str]) -> int:
    """Runs `farspan eval`.

    Args:
        argv: The arguments after `eval`.

    Returns:
        0 when everything was measured and saved.

    Raises:
        FarspanError: What the user can mend.
        SystemExit: From the argument parser, after it has printed help (0) or a message (2).
    """
    options = tyro.cli(_Command, args=argv, prog="farspan eval", description=_DESCRIPTION)

    from farspan.evaluation.loading import check_model_directory, choose_device

    check_model_directory(options.directory)  # a mistake in the directory is said at once

    import torch

    from farspan.evaluation.evaluate import evaluate

    dataset, split = find_dataset(options.directory, options.data, options.split)
    learnable = split == options.split  # the baselines learn from a train split, which must not be what is measured
    with stages() as stage:
        evaluation = evaluate(
            options.directory,
            dataset,
            split=split,
            lengths=options.lengths,
            stride=options.stride,
            protocols=options.protocols,
            max_tokens=options.max_tokens,
            max_windows=options.max_windows,
            with_baselines=options.baselines and learnable,
            batch_tokens=options.batch_tokens,
            device=choose_device(options.device),
            dtype=torch.bfloat16 if options.dtype == "bfloat16" else None,
            command=shlex.join(["farspan", "eval", *argv]),
            stage=stage,
        )
    path = evaluation.save(options.directory)
    _show(evaluation, path)
    report = _output.refresh_report(options.directory)
    if report is not None:
        _output.out.print(f"report {report}", soft_wrap=True, highlight=False)
    return 0


def find_dataset(directory: Path, data: str | None, split: str) -> "tuple[PreparedDataset, str]":
    """The dataset to evaluate on: a prepared one, a corpus tokenised for this model, or that of the run.

    Args:
        directory: the model directory.
        data: path of a prepared dataset, name or path of a corpus, or None for the dataset of the run.
        split: the split that was asked for.

    Returns:
        The dataset, and the split to read: of a corpus that is too small to have a valid split, such as a single
        file, all documents make up the train split.

    Raises:
        DataError: when there is none.
    """
    from farspan.data.corpora import Fractions, open_corpus
    from farspan.data.dataset import METADATA, open_dataset
    from farspan.data.prepare import prepare
    from farspan.evaluation.loading import load_tokenizer, read_run

    if data is None:
        known = read_run(directory).get("dataset")
        if not known:
            raise DataError(f"{directory} does not say what it was trained on; name the text with --data.")
        if not (directory / known).is_dir():
            raise DataError(f"the dataset of {directory} is gone ({directory / known}); name another with --data.")
        return open_dataset(directory / known), split
    if (Path(data) / METADATA).is_file():
        return open_dataset(data), split
    load_tokenizer(directory)  # says clearly when there is none
    corpus = open_corpus(data)
    if split == "valid" and not all(any(text.text for text in corpus.documents(part)) for part in ("train", "valid")):
        _output.message(
            f"{data} has too few documents for a valid split; all of them are evaluated, without baselines, which "
            "would have nothing else to learn from",
            label="note",
        )
        corpus, split = open_corpus(data, fractions=Fractions(0, 0)), "train"
    return prepare(corpus, directory, directory / "evaluation" / "data", overwrite=True), split


@contextlib.contextmanager
def stages() -> Iterator["Stage"]:
    """One progress bar per stage of an evaluation."""
    with _output.progress() as display:

        def stage(name: str, tokens: int) -> Callable[[int], None]:
            task = display.add_task(name, total=tokens)
            return lambda read: display.advance(task, read)

        yield stage


def _show(evaluation: "Evaluation", path: Path) -> None:
    from farspan.evaluation.tables import context_tables, summary_table

    for title, table in [*context_tables(evaluation.context).items(), summary_table(evaluation)]:
        _output.out.print(f"\n{title}", style="bold", markup=False, highlight=False, soft_wrap=True)
        _output.out.print(table)
    _output.out.print(f"results {path}", soft_wrap=True, highlight=False)
