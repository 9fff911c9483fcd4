"""The run directory: which recipe it belongs to, whether a run starts or resumes, and the model it becomes.

    recipe.yaml  run.json  metrics.jsonl  checkpoints/  tensorboard/  data/  evaluation/  report.html
    config.json  generation_config.json  model.safetensors  tokenizer.json  tokenizer_config.json

The second line makes it a model directory; it appears when training stops, `config.json` last, so that nothing reads a
model of which a part is missing. Every file is written under another name and renamed.
"""

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers.utils import logging

from farspan.data._files import write_bytes
from farspan.errors import CheckpointError, ConfigError, FarspanError
from farspan.evaluation.loading import read_run
from farspan.training.checkpoint import latest_checkpoint
from farspan.training.recipe import Recipe, load_recipe

Resume = Literal["auto", "never", "must"]

# What may differ between the recipe of a run and the one that resumes it: where things are, and what is only watched.
_FREE = ("name", "output_dir", "imports", "data.directory", "evaluation", "checkpoint", "logging")
# What says how long the run is; another length changes nothing of the steps that are done.
_LENGTH = ("train.max_steps", "train.max_tokens")


@dataclass(frozen=True)
class Run:
    """An opened run directory.

    Args:
        directory: The run directory.
        checkpoint: The complete checkpoint to resume from, or None to start.
        finished: Whether the run already reached its end.
        note: What was found and decided, for people.
    """

    directory: Path
    checkpoint: Path | None
    finished: bool
    note: str

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.directory / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The log of every step."""
        return self.directory / "metrics.jsonl"


@contextlib.contextmanager
def open_run(recipe: Recipe, resume: Resume = "auto") -> Iterator[Run]:
    """Opens the run directory of `recipe`, alone, and decides how to go on.

    With "auto", an empty or absent directory starts a run; a directory of the same recipe resumes from its newest
    complete checkpoint, or starts again if it has none; a finished run stays as it is. "must" refuses to start, "never"
    moves an earlier run aside and starts; should an error end the context before the first step, such as a corpus that
    does not exist, the earlier run is moved back. The same recipe means: equal in model, data and train. Its length may
    be another one that is not behind the newest checkpoint, a finished run goes on if it is longer: from there on, the
    learning rate is that of a run of this length.

    Args:
        recipe: A validated recipe.
        resume: "auto", "must" or "never".

    Yields:
        The run; until the context ends, no other process can open it.

    Raises:
        ConfigError: The directory belongs to another recipe or to something that is not a run.
        CheckpointError: Another process is at work in it, or there is nothing to resume although it must.
    """
    directory = recipe.run_dir
    note, aside = "", None
    if resume == "never" and (directory / "recipe.yaml").exists():
        with _alone(directory):
            aside = next(p for i in itertools.count(1) if not (p := Path(f"{directory}.{i}")).exists())
        directory.rename(aside)
        note = f"the earlier run was moved to {aside}; "
    if not directory.exists() and resume == "must":
        raise CheckpointError(f"--resume must: {str(directory)!r} does not exist, so there is nothing to resume.")
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"output_dir {str(directory)!r} is a file; name a directory.")
    directory.mkdir(parents=True, exist_ok=True)
    with _alone(directory):
        checkpoint, finished, before = _inspect(directory, recipe, resume)
        if finished:
            note += f"the run in {directory} is finished; nothing to do. To train it anew: --resume never."
        elif checkpoint:
            note += f"resuming {directory} from {checkpoint.name}"
            if before is not None:
                note += (
                    f", to {recipe.total_steps()} steps where it had {before}: the schedule is the new one from here on"
                )
                write_text(directory / "recipe.yaml", recipe.to_yaml())
        else:
            note += f"starting in {directory}"
            write_text(directory / "recipe.yaml", recipe.to_yaml())
        run = Run(directory, checkpoint, finished, note)
        try:
            yield run
        except FarspanError:
            if aside and not run.metrics.exists():
                shutil.rmtree(directory)
                aside.rename(directory)
            raise


def _inspect(directory: Path, recipe: Recipe, resume: Resume) -> tuple[Path | None, bool, int | None]:
    """The checkpoint to resume from, whether the run is finished, and the steps that it had if they are others now.

    A directory of something else is refused.
    """
    checkpoint = latest_checkpoint(directory / "checkpoints")
    finished, before = bool(read_run(directory).get("finished")), None
    if (directory / "recipe.yaml").exists():
        if checkpoint or finished:
            old = load_recipe(directory / "recipe.yaml")
            _require_same(old, recipe, directory)
            if old.total_steps() != recipe.total_steps():
                _require_reachable(checkpoint, recipe, directory)
                finished, before = False, old.total_steps()
    elif (foreign := next((n for n in ("config.json", "checkpoints") if (directory / n).exists()), None)) is not None:
        raise ConfigError(
            f"output_dir {str(directory)!r} holds {foreign} but no recipe.yaml, so it is not a run of farspan train; "
            "choose another output_dir."
        )
    if resume == "must" and not (checkpoint or finished):
        raise CheckpointError(f"--resume must: {str(directory / 'checkpoints')!r} holds no complete checkpoint.")
    return checkpoint, finished, before


def _require_reachable(checkpoint: Path | None, recipe: Recipe, directory: Path) -> None:
    """Refuses a length that the run has passed, or that it cannot be continued to."""
    if checkpoint is None:
        raise CheckpointError(
            f"{str(directory)!r} is finished and has no checkpoint to go on from; to train its model further, start a "
            "run with --model.from-pretrained."
        )
    done = int(checkpoint.name.removeprefix("step_"))
    if recipe.total_steps() < done:
        raise ConfigError(
            f"train.max_steps: {str(directory)!r} has done {done} steps, and would have {recipe.total_steps()}; give "
            f"{done} or more, or another --output-dir."
        )


def _require_same(old: Recipe, new: Recipe, directory: Path) -> None:
    """Refuses to continue a run with another recipe."""
    before, after = _flat(old.to_dict()), _flat(new.to_dict())
    differing = [
        f"{name} (was {before.get(name)!r}, now {after.get(name)!r})"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
        and not any(name == f or name.startswith(f + ".") for f in (*_FREE, *_LENGTH))
    ]
    if differing:
        raise ConfigError(
            f"{str(directory)!r} holds a run of another recipe; it differs in {', '.join(differing)}. Give the old "
            "values to resume it, --output-dir another directory to keep both, or --resume never to move it aside and "
            "start. To train its model further, start a run with --model.from-pretrained."
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value})
    return flat


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Holds the lock of a run directory; the system drops it with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # no advisory locks on this system
        yield
        return
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"another process is training in {str(directory)!r}; wait for it, stop it or choose another output_dir."
            ) from None
        yield


def write_text(path: Path, text: str) -> None:
    """Writes a small text file that is whole whenever it is there."""
    write_bytes(path, text.encode())


def write_run(directory: Path, content: dict[str, Any]) -> None:
    """Writes run.json."""
    write_text(directory / "run.json", json.dumps(content, indent=2) + "\n")


def export_model(directory: Path, model: Any, tokenizer: Any) -> None:
    """Makes `directory` a model directory: weights, tokenizer, generation defaults and, last, config.json.

    Args:
        directory: The run directory.
        model: A transformers model.
        tokenizer: Its tokenizer.
    """
    partial = directory / ".model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with _without_progress_bars():
        model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, directory / path.name)
    partial.rmdir()


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Keeps transformers' bars out of the run's own display."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
