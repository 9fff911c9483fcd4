"""A corpus and a model so small that a whole run takes a fraction of a second."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from farspan.data.prepare import prepare
from farspan.training.logs import read_metrics
from farspan.training.recipe import Recipe
from farspan.training.schema import build


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty short texts in which counting is all there is to learn."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        lines = (str(value) for value in range(number, number + 40))
        (folder / f"{number:02}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def dataset_directory(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That corpus in bytes, prepared once for all tests."""
    directory = tmp_path_factory.mktemp("dataset") / "data"
    prepare(corpus, "byte", directory, progress=False)
    return directory


@pytest.fixture
def tiny(tmp_path: Path, corpus: Path, dataset_directory: Path) -> Callable[..., Recipe]:
    """Makes a recipe of 12 steps; keyword arguments such as `train={"seed": 1}` override its sections."""

    def make(name: str = "run", **sections: dict[str, Any]) -> Recipe:
        values: dict[str, Any] = {
            "model": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_attention_heads": 2,
                "mixers": ["metala", "softmax"],
                "hidden_dropout": 0.1,  # so that a generator that is not restored shows
                "tie_word_embeddings": True,
            },
            "data": {"corpus": str(corpus), "directory": str(dataset_directory), "sequence_length": 16},
            "train": {"max_steps": 12, "per_device_train_batch_size": 2, "precision": "fp32", "warmup_steps": 2},
            "evaluation": {"eval_steps": 5, "max_windows": 2},
            "checkpoint": {"save_steps": 3},
            "logging": {"tensorboard": False, "progress": "none"},
        }
        for section, overrides in sections.items():
            values[section] = values[section] | overrides
        return build(Recipe, {"name": name, "output_dir": str(tmp_path / name), **values}).validate()

    return make


@pytest.fixture
def changed() -> Callable[..., Recipe]:
    """Copies a recipe with fields of one section changed."""

    def change(recipe: Recipe, section: str, **values: Any) -> Recipe:
        return dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **values)})

    return change


@pytest.fixture
def history() -> Callable[[Path], list[dict[str, Any]]]:
    """The rows of a run's metrics.jsonl without those that measure time."""

    def read(run_dir: Path) -> list[dict[str, Any]]:
        timed = ("seconds", "tokens_per_second", "flops_per_second")
        rows = read_metrics(run_dir / "metrics.jsonl")
        return [{name: value for name, value in row.items() if name not in timed} for row in rows]

    return read


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Equal digits need an equal number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
