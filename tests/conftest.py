"""Shared fixtures: one thread, fixed seeds, a small hypothesis profile, and the folder of golden data."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default", max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("default")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden_directory() -> Path:
    """The folder named by FARSPAN_GOLDEN, by default `shared/golden` beside the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "golden"
    directory = Path(os.environ.get("FARSPAN_GOLDEN", default))
    if not directory.is_dir():
        pytest.skip(f"no golden data at {directory}; set FARSPAN_GOLDEN to a folder that has it")
    return directory
