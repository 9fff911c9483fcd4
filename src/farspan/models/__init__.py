"""The model family. Importing this package registers it with the Auto classes of transformers."""

from typing import TYPE_CHECKING, Any

from farspan._lazy import lazy_attributes

if TYPE_CHECKING:
    from farspan.models.cache import FarspanCache
    from farspan.models.causal_lm import FarspanForCausalLM
    from farspan.models.configuration import FarspanConfig
    from farspan.models.heads import (
        FarspanForMaskedLM,
        FarspanForSequenceClassification,
        FarspanForTokenClassification,
    )
    from farspan.models.modeling import FarspanModel
    from farspan.models.vision import FarspanForImageClassification
    from farspan.models.vision_options import VisionOptions

__all__ = [
    "FarspanCache",
    "FarspanConfig",
    "FarspanForCausalLM",
    "FarspanForImageClassification",
    "FarspanForMaskedLM",
    "FarspanForSequenceClassification",
    "FarspanForTokenClassification",
    "FarspanModel",
    "VisionOptions",
]

_load = lazy_attributes(
    {
        "FarspanConfig": "farspan.models.configuration",
        "FarspanCache": "farspan.models.cache",
        "FarspanModel": "farspan.models.modeling",
        "FarspanForCausalLM": "farspan.models.causal_lm",
        "FarspanForImageClassification": "farspan.models.vision",
        "VisionOptions": "farspan.models.vision_options",
        "FarspanForMaskedLM": "farspan.models.heads",
        "FarspanForSequenceClassification": "farspan.models.heads",
        "FarspanForTokenClassification": "farspan.models.heads",
    }
)


def __getattr__(name: str) -> Any:
    return _load(__name__, name)
