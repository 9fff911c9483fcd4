"""Presets have the size they say."""

import pytest
import torch

import farspan.models
from farspan.errors import ConfigError
from farspan.models import presets


@pytest.mark.parametrize("name", presets.names())
def test_parameter_count(name: str) -> None:
    preset = presets.find(name)
    config = preset.config()
    architecture = (config.architectures or ["FarspanForCausalLM"])[0]
    with torch.device("meta"):
        model = getattr(farspan.models, architecture)(config)
    model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == preset.parameters
    assert preset.source


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="did you mean 'metala-3m'"):
        presets.get("metala3m")
