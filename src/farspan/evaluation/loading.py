"""A model directory on disk: the model and its tokenizer, what they were trained on, and clear words when they fail."""

import contextlib
import importlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farspan.errors import CheckpointError, ConfigError, FarspanError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from farspan.models import FarspanConfig, FarspanForCausalLM

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_RUN_FIELDS: dict[str, type] = {
    "name": str,
    "imports": list,
    "sequence_length": int,
    "dataset": str,
    "corpus": dict,
    "versions": dict,
    "parameters": int,
    "step": int,
    "tokens": int,
    "bits_per_byte": float,
}
_CORPUS_FIELDS: dict[str, type] = {"name": str, "fingerprint": str, "tokenizer": str, "splits": dict}


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
    """The configuration of a model directory; the modules that its run imported are imported before.

    Raises:
        CheckpointError: when it is not readable as one of Farspan's.
        ConfigError: when a module cannot be imported.
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
    import_modules(read_run(directory).get("imports", ()))
    try:
        with _quiet():
            return FarspanConfig.from_pretrained(path.parent, local_files_only=True)
    except FarspanError as error:
        raise CheckpointError(f"{path} is not accepted: {error}") from error
    except Exception as error:  # transformers reads some fields, such as dtype, as they stand
        raise CheckpointError(f"{path} is damaged: {reason(error)}.") from error


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
    if config.architectures not in (None, [], ["FarspanForCausalLM"]):
        raise CheckpointError(
            f"{directory} holds a {', '.join(config.architectures)}, which writes no text; load it with "
            "AutoModel classes of transformers after `import farspan`."
        )
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
        raise CheckpointError(f"the weights in {directory} cannot be read: {reason(error)}") from error
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
    """What `farspan train` wrote of the run in this directory (run.json); empty for other model directories.

    Raises:
        CheckpointError: when the file is damaged.
    """
    path = Path(directory) / "run.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {reason(error)}. Put back the file or delete it.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object. Put back the file or delete it.")
    corpus = content.get("corpus")
    found = [(content, _RUN_FIELDS, name) for name in _RUN_FIELDS if name in content]
    found += [(corpus, _CORPUS_FIELDS, name) for name in _CORPUS_FIELDS] if isinstance(corpus, dict) else []
    for values, kinds, name in found:
        if not isinstance(values.get(name), kinds[name]):
            raise CheckpointError(
                f"{path} is damaged: {name} is {values.get(name)!r}, not {kinds[name].__name__}. "
                "Put back the file or delete it."
            )
    return content


def import_modules(names: Iterable[str]) -> None:
    """Imports Python modules by name, such as one that registers a mixer.

    Raises:
        ConfigError: when one of them cannot be found.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except (ImportError, TypeError, ValueError) as error:
            raise ConfigError(
                f"imports: {name!r} cannot be imported ({reason(error)}). Install the module, or name its folder in "
                "PYTHONPATH."
            ) from error


def reason(error: BaseException) -> str:
    """The first line of what an exception says, never empty."""
    return str(error).strip().split("\n")[0] or type(error).__name__


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
    accepted = "Accepted: auto, cpu, cuda, cuda:N."
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {name!r} cannot be used here: {reason(error)} {accepted}") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} cannot be used: models run on the CPU or an NVIDIA GPU. {accepted}")
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
