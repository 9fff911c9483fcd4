"""What published configurations of several families have in common."""

from collections.abc import Mapping
from typing import Any

from farspan.errors import CheckpointError, nearest
from farspan.models.configuration import FarspanConfig

# Activations by their names in transformers, where these differ from ours. The tanh forms are one function.
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "swish": "silu"}
_SAME_NAME = ("gelu", "relu", "sigmoid", "silu")
# Special tokens and names of classes, which every configuration calls alike.
_SHARED = ("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "problem_type")


def our_activation(name: str) -> str:
    """Our name of an activation of transformers.

    Raises:
        CheckpointError: for one that Farspan does not have.
    """
    if name not in _ACTIVATIONS and name not in _SAME_NAME:
        raise CheckpointError(f"Activation {name!r} is not known: {nearest(name, (*_ACTIVATIONS, *_SAME_NAME))}")
    return _ACTIVATIONS.get(name, name)


def published_activation(name: str) -> str:
    """The name that transformers has for one of our activations."""
    return "gelu_new" if name == "gelu_tanh" else name


def refuse_other(config: Mapping[str, Any], accepted: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuses settings that would change the result and that Farspan does not have.

    Args:
        config: published configuration.
        accepted: field → the values that are understood; an absent field is, too.

    Raises:
        CheckpointError: naming the first other value.
    """
    for name, values in accepted.items():
        if name in config and config[name] not in values:
            raise CheckpointError(
                f"config.json has {name}={config[name]!r}, which cannot be converted; accepted: "
                f"{' or '.join(repr(value) for value in values)}."
            )


def shared_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens and names of classes that a published configuration holds, as fields of ours.

    A negative token, as the padding of the first LLaMA, means that there is none.
    """
    found = {name: config[name] for name in _SHARED if name in config}
    found |= {name: None for name, value in found.items() if isinstance(value, int) and value < 0}
    if found.get("id2label") is None and "num_labels" in config:
        found["num_labels"] = config["num_labels"]
    return found


def published_fields(config: FarspanConfig) -> dict[str, Any]:
    """The inverse of `shared_fields`."""
    return {name: getattr(config, name) for name in _SHARED}
