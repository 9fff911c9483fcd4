"""Every kernel has a test that compiles it ahead; that each has run is for `test_every_kernel_interpreted.py`."""

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
SOURCE = TESTS.parents[1] / "src"


def kernels() -> Iterator[str]:
    """Module and name of every function in the sources that Triton compiles and that is launched."""
    for path in sorted(SOURCE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "triton.jit" in text else ():
            launched = isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
            if launched and any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                yield ".".join((*path.relative_to(SOURCE).with_suffix("").parts, node.name))


def used(path: Path) -> Iterator[str]:
    """What a test takes from modules: `module.name`, imported and then named in its code."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = {alias.asname or alias.name: f"{node.module}.{alias.name}" for node in imports for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in names:
            yield names[node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            yield f"{names[node.value.id]}.{node.attr}"


def test_every_kernel_is_compiled_ahead_of_time() -> None:
    every = set(kernels())
    assert len(every) > 60, "kernels are no longer found"
    compiled = {name for path in TESTS.glob("test_*_compiled*.py") for name in used(path)}
    assert every <= compiled, f"no test compiles {sorted(every - compiled)}"
