"""What importing Farspan costs, and which part may import which."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import farspan

ROOT = Path(farspan.__file__).parent

# The rooms from the top to the ground. A room may import itself and what stands below it.
MAY_IMPORT = {
    "cli": {"training", "evaluation", "models", "mixers", "nn", "ops", "data", "distributed"},
    "training": {"evaluation", "models", "mixers", "nn", "ops", "data", "distributed"},
    "evaluation": {"models", "mixers", "nn", "ops", "data"},
    "models": {"mixers", "nn", "ops"},
    "mixers": {"nn", "ops", "distributed"},
    "nn": {"ops"},
    "ops": set(),
    "data": set(),
    "distributed": set(),
}


def run(script: str) -> dict:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout)


def test_import_is_cheap_and_light() -> None:
    found = run(
        "import json, sys, time, torch\n"
        "start = time.process_time()\n"
        "import farspan\n"
        "seconds = time.process_time() - start\n"
        "names = ('triton', 'transformers.modeling_utils', 'matplotlib', 'tyro')\n"
        "print(json.dumps({'seconds': seconds, 'loaded': [name for name in names if name in sys.modules]}))"
    )
    assert found["loaded"] == []
    assert found["seconds"] < 1.5


def test_operators_and_mixers_need_no_transformers_models() -> None:
    found = run(
        "import json, sys\n"
        "import farspan.ops, farspan.nn, farspan.mixers.metala, farspan.mixers.softmax\n"
        "names = ('triton', 'transformers.modeling_utils')\n"
        "print(json.dumps({'loaded': [name for name in names if name in sys.modules]}))"
    )
    assert found["loaded"] == []


def test_public_names_resolve() -> None:
    for room in ["", *MAY_IMPORT]:
        module = importlib.import_module(f"farspan.{room}".rstrip("."))
        for name in getattr(module, "__all__", ()):
            assert getattr(module, name) is not None, f"{module.__name__}.{name}"


def imports(path: Path) -> list[tuple[int, str]]:
    """Line and dotted name of everything of Farspan that a file imports, also inside functions."""
    found = []
    package = path.relative_to(ROOT.parent).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # lazy references, "farspan.x.y:name"
            name, colon, _ = node.value.partition(":")
            if colon and name.startswith("farspan.") and all(part.isidentifier() for part in name.split(".")):
                found.append((node.lineno, name))
    return [(line, name) for line, name in found if name.split(".")[0] == "farspan"]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_point_downwards(room: str) -> None:
    wrong = []
    for path in sorted((ROOT / room).rglob("*.py")):
        for line, name in imports(path):
            target = name.split(".")[1] if "." in name else ""
            if target in MAY_IMPORT and target != room and target not in MAY_IMPORT[room]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_every_room_is_in_the_table() -> None:
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert rooms == set(MAY_IMPORT)


def test_what_every_room_may_use_imports_none_of_them() -> None:
    for name in ("errors.py", "_lazy.py"):
        assert not [found for _, found in imports(ROOT / name) if found.split(".")[1] in MAY_IMPORT], name


def test_files_stay_small() -> None:
    # About 400 lines: a little more may still be one concept.
    long = {
        str(path.relative_to(ROOT)): lines
        for path in ROOT.rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 450
    }
    assert not long, f"longer than about 400 lines: {long}"
