"""A tiny trained run, made once by `farspan train`, and a copy of it for each test that changes something."""

import shutil
from pathlib import Path

import pytest

from farspan.cli.main import main

RECIPE = """
name: tiny
model: {hidden_size: 16, intermediate_size: 32, num_attention_heads: 2, mixers: [metala]}
data: {corpus: CORPUS, tokenizer: byte, sequence_length: 32, valid_fraction: 0.2, test_fraction: 0.1}
train: {max_steps: 2, per_device_train_batch_size: 2, precision: fp32}
evaluation: {eval_steps: 0, max_windows: 2}
logging: {tensorboard: false, progress: none}
"""


@pytest.fixture(scope="session")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpus/, recipe.yaml and run/, the run finished."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "corpus").mkdir()
    for number in range(30):
        text = f"def f{number}(x):\n    return x + {number}  # é\n" * 4
        (folder / "corpus" / f"{number}.py").write_text(text, encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE.replace("CORPUS", str(folder / "corpus")))
    assert main(["train", str(folder / "recipe.yaml"), "--output-dir", str(folder / "run")]) == 0
    return folder


@pytest.fixture(scope="session")
def tiny_run(_finished: Path) -> Path:
    """The run directory; not to be changed."""
    return _finished / "run"


@pytest.fixture
def workspace(_finished: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to do with as one likes."""
    return Path(shutil.copytree(_finished, tmp_path / "work"))
