"""Farspan: language models whose attention reaches far.

Five published mechanisms and softmax attention as interchangeable layers of one Hugging-Face-compatible model, exact on
CPU, fast on NVIDIA GPUs. Rooms, from the bottom: `ops` (functions of tensors), `nn` (modules), `mixers` (mechanisms),
`models` (the stack), `data`, `evaluation`, `training`, `cli`.

Importing this package is light. The Auto classes of transformers know Farspan models from the moment they are imported.
"""

from typing import TYPE_CHECKING, Any

from farspan._lazy import LazyValues, after_import, lazy_attributes

if TYPE_CHECKING:
    from farspan.mixers.base import Mixer, register_mixer
    from farspan.mixers.dilated import DilatedAttention
    from farspan.models import presets
    from farspan.models.causal_lm import FarspanForCausalLM
    from farspan.models.configuration import FarspanConfig
    from farspan.models.heads import (
        FarspanForMaskedLM,
        FarspanForSequenceClassification,
        FarspanForTokenClassification,
    )
    from farspan.models.modeling import FarspanModel
    from farspan.models.vision import FarspanForImageClassification
    from farspan.nn.feed_forward import FeedForward, register_feed_forward

__version__ = "0.1.0"

__all__ = [
    "DilatedAttention",
    "FarspanConfig",
    "FarspanForCausalLM",
    "FarspanForImageClassification",
    "FarspanForMaskedLM",
    "FarspanForSequenceClassification",
    "FarspanForTokenClassification",
    "FarspanModel",
    "FeedForward",
    "Mixer",
    "presets",
    "register_feed_forward",
    "register_mixer",
]

_load = lazy_attributes(
    {
        "DilatedAttention": "farspan.mixers.dilated",
        "FarspanConfig": "farspan.models.configuration",
        "FarspanForCausalLM": "farspan.models.causal_lm",
        "FarspanForImageClassification": "farspan.models.vision",
        "FarspanForMaskedLM": "farspan.models.heads",
        "FarspanForSequenceClassification": "farspan.models.heads",
        "FarspanForTokenClassification": "farspan.models.heads",
        "FarspanModel": "farspan.models.modeling",
        "FeedForward": "farspan.nn.feed_forward",
        "Mixer": "farspan.mixers.base",
        "presets": "farspan.models.presets",
        "register_feed_forward": "farspan.nn.feed_forward",
        "register_mixer": "farspan.mixers.base",
    }
)


def __getattr__(name: str) -> Any:
    return _load(__name__, name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def _register_config() -> None:
    from transformers import AutoConfig

    from farspan.models.configuration import FarspanConfig

    AutoConfig.register("farspan", FarspanConfig, exist_ok=True)


def _register_models() -> None:
    # The classes are named, not imported: transformers may be in the middle of importing its own base classes here.
    from transformers.models.auto import modeling_auto

    from farspan.models.configuration import FarspanConfig

    for name, home in (
        ("MODEL_MAPPING", "modeling:FarspanModel"),
        ("MODEL_FOR_CAUSAL_LM_MAPPING", "causal_lm:FarspanForCausalLM"),
        ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING", "vision:FarspanForImageClassification"),
        ("MODEL_FOR_MASKED_LM_MAPPING", "heads:FarspanForMaskedLM"),
        ("MODEL_FOR_PRETRAINING_MAPPING", "heads:FarspanForMaskedLM"),
        ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", "heads:FarspanForSequenceClassification"),
        ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING", "heads:FarspanForTokenClassification"),
    ):
        mapping = getattr(modeling_auto, name)
        mapping._extra_content = LazyValues(mapping._extra_content)
        mapping.register(FarspanConfig, f"farspan.models.{home}", exist_ok=True)
        # Trainer (label smoothing) and pipelines ask for the class among these names.
        mapping._model_mapping[FarspanConfig.model_type] = home.partition(":")[2]


after_import(
    {
        "transformers.models.auto.configuration_auto": _register_config,
        "transformers.models.auto.modeling_auto": _register_models,
    }
)
