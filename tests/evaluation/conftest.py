"""Fixtures of the tests of evaluation."""

import pytest

from farspan.models import FarspanForCausalLM
from tests.evaluation.tiny_evaluation import tiny_model


@pytest.fixture(params=["softmax", "metala"])
def model(request: pytest.FixtureRequest) -> FarspanForCausalLM:
    """A one-layer model of each mixer."""
    return tiny_model(request.param)
