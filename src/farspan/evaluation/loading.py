"""A model directory on disk: the model and its tokenizer, what they were trained on, and clear words when they fail."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farspan.errors import CheckpointError, ConfigError, FarspanError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from farspan.models import FarspanConfig, FarspanForCausalLM

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def check_model_directory(directory: str | Path) -> Path:
    """The directory as a path, if it holds a model.

    Raises:
        CheckpointError: when it does not exist or something is missing; the message names what.
    """
    path = Path(directory)
    if not path.exists():
        raise CheckpointError(f"model directory {path} does not exist.")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; give the directory of a model.")
    if not (path / "config.json").is_file():
        training = (path / "recipe.yaml").is_file()
        hint = "training in it has not stopped yet" if training else "`farspan train` makes model directories"
        raise CheckpointError(f"{path} is not a model directory: it has no config.json; {hint}.")
    if not any((path / name).is_file() for name in WEIGHTS):
        raise CheckpointError(f"{path} is incomplete: it has a config.json but no {WEIGHTS[0]}.")
    return path


def load_config(directory: str | Path) -> "FarspanConfig":
    """The configuration of a model directory.

    Raises:
        CheckpointError: when it is not readable as one of Farspan's.
    """
    from farspan.models import FarspanConfig

    path = check_model_directory(directory) / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from None
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind != FarspanConfig.model_type:
        raise CheckpointError(f"{path} describes a model of type {kind!r}; Farspan evaluates its own ('farspan').")
    try:
        with _quiet():
            return FarspanConfig.from_pretrained(path.parent, local_files_only=True)
    except FarspanError as error:
        raise CheckpointError(f"{path} is not accepted: {error}") from error


def load_model(
    directory: str | Path, *, device: "torch.device | str" = "cpu", dtype: "torch.dtype | None" = None
) -> "FarspanForCausalLM":
    """The model of a directory, in evaluation mode.

    Args:
        directory: a model directory, such as a run of `farspan train`.
        device: where to put it.
        dtype: of the weights; None is float32.

    Raises:
        CheckpointError: when something is missing, damaged, or belongs to another configuration.
    """
    import torch
    from safetensors import SafetensorError

    from farspan.models import FarspanForCausalLM

    config = load_config(directory)
    try:
        with _quiet():
            model, found = FarspanForCausalLM.from_pretrained(
                directory,
                config=config,
                dtype=dtype or torch.float32,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are reported, and refused below
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"the weights in {directory} cannot be read: {reason}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(key if isinstance(key, str) else key[0] for key in found[what]):
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise CheckpointError(
                f"the weights in {directory} are not those of its config.json: {what.replace('_', ' ')} "
                f"{keys[0]}{more}. Put back the config.json that was saved with them."
            )
    return model.eval().to(device)


def load_tokenizer(directory: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model directory.

    Raises:
        CheckpointError: when there is none.
        DataError: when it cannot be read.
    """
    from farspan.data.tokenizers import load_tokenizer as load

    path = check_model_directory(directory)
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise CheckpointError(f"{path} has no tokenizer (tokenizer.json); put the one it was trained with there.")
    with _quiet():
        return load(path)


def read_run(directory: str | Path) -> dict[str, Any]:
    """What `farspan train` wrote of the run in this directory (run.json); empty for other model directories."""
    try:
        content = json.loads((Path(directory) / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def trained_length(directory: str | Path, config: "FarspanConfig") -> int:
    """The sequence length of training: from run.json, otherwise `max_position_embeddings`."""
    return int(read_run(directory).get("sequence_length") or config.max_position_embeddings)


def choose_device(name: str) -> "torch.device":
    """The device called `name`; "auto" is the first GPU, otherwise the CPU.

    Raises:
        ConfigError: for a name torch does not know, or a device that is not there.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"device {name!r} cannot be used here: {reason} Accepted: auto, cpu, cuda, cuda:N.") from None
    return device


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the progress bars and notes of transformers: what matters is raised."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
