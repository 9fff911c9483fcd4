"""What published configurations of several families have in common."""

import math
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


def read_rope(config: Mapping[str, Any], default_theta: float = 10000.0) -> tuple[dict[str, Any], float]:
    """The rotation that a published configuration describes, old form (`rope_theta`, `rope_scaling`) or new.

    Returns:
        Our `rope_parameters`, and the share of a head's channels that is rotated.

    Raises:
        CheckpointError: for a type that Farspan does not have.
    """
    found = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind = found.pop("rope_type", found.pop("type", "default"))
    found.pop("type", None)
    theta = first_of((found, config), ("rope_theta", "rotary_emb_base"), default_theta)
    share = first_of((found, config), ("partial_rotary_factor", "rotary_pct"), 1.0)
    for name in ("rope_theta", "partial_rotary_factor"):
        found.pop(name, None)
    if kind not in ("default", "linear", "dynamic", "yarn", "llama3"):
        raise CheckpointError(
            f"config.json has the rotation {kind!r}, which cannot be converted; accepted: 'default', 'linear', "
            "'dynamic', 'yarn' or 'llama3'."
        )
    if kind == "dynamic":  # transformers reads the trained length from max_position_embeddings alone
        found.pop("original_max_position_embeddings", None)
    return {"rope_type": kind, "rope_theta": float(theta), **found}, float(share)


def first_of(places: tuple[Mapping[str, Any], ...], names: tuple[str, ...], default: Any) -> Any:
    """The first value that one of some settings has; `default` if none of them is there."""
    return next((place[name] for place in places for name in names if name in place), default)


def rotated_share(share: float, head_dim: int) -> float:
    """A share of `head_dim` channels that rounds down to the number that the published code rotates."""
    channels = int(head_dim * share)
    exact = channels / head_dim
    return exact if int(head_dim * exact) == channels else math.nextafter(exact, 2.0)
