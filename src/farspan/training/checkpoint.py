"""Training state on disk: written in the background, complete or absent, and enough to continue to the same digits.

    checkpoints/step_00000200/           appears under this name only when everything in it is written
        .metadata  __0_0.distcp          weights and optimiser (torch.distributed.checkpoint)
        progress.json                    step, tokens and seconds so far
        rank_0.pt                        random generators and data position of each rank
        checksums.json                   sha256 of each of these files

A checkpoint is written as `step_00000200.partial` and renamed when all of it is there, the checksums last; loading
verifies them. Killing the process at any moment leaves at most a `.partial` folder, which is never read and is swept
away by the next run. Checkpoints hold pickled metadata: read your own, and share the model directory instead.
"""

import contextlib
import errno
import hashlib
import json
import random
import re
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from farspan.errors import CheckpointError
from farspan.evaluation.loading import reason
from farspan.training.parallel import Parallel

CHECKSUMS = "checksums.json"


@dataclass
class Progress:
    """How far a run is.

    Args:
        step: Optimiser steps done.
        tokens: Tokens read, over all ranks.
        seconds: Time spent in steps, over all restarts.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def latest_checkpoint(directory: Path) -> Path | None:
    """The complete checkpoint with the highest step in `directory`, or None."""
    found = complete_checkpoints(directory)
    return found[-1] if found else None


def complete_checkpoints(directory: Path) -> list[Path]:
    """All complete checkpoints in `directory`, by step."""
    if not directory.is_dir():
        return []
    named = [path for path in directory.iterdir() if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted((p for p in named if (p / ".metadata").is_file()), key=lambda p: int(p.name.removeprefix("step_")))


class Checkpointer:
    """Saves, keeps the newest few, and loads.

    Args:
        directory: Folder of the checkpoints.
        keep: How many complete checkpoints stay.
        parallel: The processes that save together.
    """

    def __init__(self, directory: Path, keep: int, parallel: Parallel) -> None:
        self.directory, self.keep, self.parallel = directory, keep, parallel
        self._pending: tuple[Future[None], Path, Path] | None = None
        self._writer = ThreadPoolExecutor(1)
        # torch warns on every save and load that one process saves alone; that is the intent here.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

    def sweep(self) -> None:
        """Deletes what an earlier process left half-written."""
        if self.parallel.is_main and self.directory.is_dir():
            for path in self.directory.glob("*.partial"):
                shutil.rmtree(path)

    def save(self, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
        """Starts saving; weights and optimiser are copied before it returns, and written while training goes on.

        Args:
            progress: Where the run stands.
            model: The model.
            optimizer: Its optimiser.
            loader: The data loader, with `state_dict()`.

        Raises:
            CheckpointError: This save could not start, or the one before it failed; earlier checkpoints are intact.
        """
        self.wait()  # one save at a time
        target = self.directory / _name(progress.step)
        if (target / ".metadata").is_file():
            return
        partial = target.with_name(target.name + ".partial")
        try:
            partial.mkdir(parents=True, exist_ok=True)
            (partial / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
            rank_state = {"rng": _rng_state(), "loader": loader.state_dict()}
            torch.save(rank_state, partial / f"rank_{self.parallel.rank}.pt")
            weights, moments = get_state_dict(model, optimizer)
            # (in one process async_save returns the plain future of the upload)
            uploading: Any = dcp.async_save(
                {"model": weights, "optimizer": moments},
                checkpoint_id=partial,
                process_group=self.parallel.checkpoint_group,
            )
        except (OSError, RuntimeError) as error:
            raise self._failed(partial, error) from error
        self._pending = self._writer.submit(_complete, uploading, partial), partial, target

    def poll(self) -> None:
        """Completes the pending save if it has been written; call it between steps.

        Raises:
            CheckpointError: It could not be written; earlier checkpoints are intact.
        """
        if self._pending is not None and self._pending[0].done():
            self.wait()

    def wait(self) -> None:
        """Completes the pending save, waiting for it.

        Raises:
            CheckpointError: It could not be written; earlier checkpoints are intact.
        """
        if self._pending is None:
            return
        future, partial, target = self._pending
        self._pending = None
        try:
            future.result()
            if target.exists():
                shutil.rmtree(target)  # incomplete, or save() would have left it alone
            partial.rename(target)
        except (OSError, RuntimeError, CheckpointException) as error:
            raise self._failed(partial, error) from error
        for old in complete_checkpoints(self.directory)[: -self.keep]:
            doomed = old.rename(old.with_name(old.name + ".partial"))  # so that half a deletion is never read either
            shutil.rmtree(doomed)

    def close(self) -> None:
        """Lets a pending save finish, without complaint: for the way out of an error that matters more."""
        with contextlib.suppress(CheckpointError):
            self.wait()
        self._writer.shutdown()

    def load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Progress, dict[str, Any]]:
        """Reads a checkpoint into the model and the optimiser.

        Args:
            path: A complete checkpoint.
            model: A model of the same shape; overwritten.
            optimizer: Its optimiser; overwritten.

        Returns:
            The progress, and this rank's `loader` and `rng` state. Give the first to the loader, make its iterator,
            and only then call `restore_rng` with the second: making an iterator draws from the global generator.

        Raises:
            CheckpointError: The checkpoint is damaged or belongs to another model.
        """
        try:
            _verify(path)
            weights, moments = get_state_dict(model, optimizer)
            state: dict[str, Any] = {"model": weights, "optimizer": moments}
            dcp.load(state, checkpoint_id=path, process_group=self.parallel.checkpoint_group)
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
            progress = Progress(**json.loads((path / "progress.json").read_text(encoding="utf-8")))
            if path.name != _name(progress.step):
                raise CheckpointError(f"its progress.json is that of step {progress.step}")
            rank_state = torch.load(path / f"rank_{self.parallel.rank}.pt", weights_only=True)
        except (Exception, CheckpointException) as error:
            raise CheckpointError(
                f"checkpoint {str(path)!r} cannot be read: {reason(_cause(error)).rstrip('.')}. Delete that folder to "
                "resume from the checkpoint before it."
            ) from error
        return progress, rank_state

    def _failed(self, partial: Path, error: BaseException) -> CheckpointError:
        """Clears the failed attempt away and says what is left."""
        shutil.rmtree(partial, ignore_errors=True)
        cause, earlier = _cause(error), latest_checkpoint(self.directory)
        step = partial.name.removesuffix(".partial").removeprefix("step_").lstrip("0")
        what = f"{type(cause).__name__}: {reason(cause)}"
        if is_disk_full(cause):
            what = f"no space left on the disk of {str(self.directory)!r}"
        kept = "there is no earlier one"
        if earlier:
            kept = f"{earlier.name} is intact: free some space and run the same command again to resume from it"
        return CheckpointError(f"the checkpoint of step {step} was not written: {what}; {kept}.")


def _name(step: int) -> str:
    """Folder of the checkpoint of a step."""
    return f"step_{step:08d}"


def _complete(uploading: "Future[Any]", partial: Path) -> None:
    """Waits until torch has written its files, then adds the checksums of all."""
    uploading.result()
    sums = {path.name: _checksum(path) for path in sorted(partial.iterdir())}
    (partial / CHECKSUMS).write_text(json.dumps(sums, indent=2), encoding="utf-8")


def _verify(path: Path) -> None:
    """Raises unless the files of a checkpoint are those that were written."""
    for name, expected in json.loads((path / CHECKSUMS).read_text(encoding="utf-8")).items():
        if _checksum(path / name) != expected:
            raise CheckpointError(f"{name} is damaged, its checksum is another than when it was written")


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_disk_full(error: BaseException) -> bool:
    """Whether writing failed for want of space, as the system, torch or safetensors say it."""
    # torch's zip writer learns of a short write without its reason, and calls it an unexpected position.
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
        words in str(error) for words in ("No space left on device", "StorageFull", "unexpected pos")
    )


def _cause(error: BaseException) -> BaseException:
    """The failure itself, out of the wrapping that torch puts around it."""
    if isinstance(error, CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


def _rng_state() -> dict[str, Any]:
    """States of all global generators, as types that a weights-only load accepts."""
    kind, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Sets all global generators to a state that `Checkpointer.load` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
