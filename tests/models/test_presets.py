"""Presets have the size they say."""

import pytest
import torch

from farspan import FarspanForCausalLM
from farspan.errors import ConfigError
from farspan.models import presets

COUNTS = {"metala-3m": 3_005_664, "softmax-3m": 3_000_384, "hybrid-3m": 3_004_992}


def test_every_preset_is_counted() -> None:
    assert presets.names() == sorted(COUNTS)


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_parameter_count(name: str) -> None:
    with torch.device("meta"):
        model = FarspanForCausalLM(presets.get(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[name]


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="did you mean 'metala-3m'"):
        presets.get("metala3m")
