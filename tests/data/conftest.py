"""A small corpus of made-up programs, and the dataset made from it."""

from pathlib import Path

import pytest

from farspan.data.dataset import PreparedDataset
from farspan.data.prepare import prepare


def program(number: int) -> str:
    return "\n".join(f"def f{number}_{line}(x):\n    return x * {line} + {number}" for line in range(number % 13 + 1))


@pytest.fixture(scope="session")
def corpus_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        (folder / f"{number:02d}.py").write_text(program(number))
    (folder / "empty.py").write_text("")
    return folder


@pytest.fixture(scope="session")
def dataset(corpus_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    out = tmp_path_factory.mktemp("prepared") / "bytes"
    return prepare(corpus_directory, "byte", out, valid=0.1, test=0.1, workers=1)
