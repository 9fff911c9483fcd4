"""Kernels run in one of two worlds per process: interpreted on the CPU (TRITON_INTERPRET=1), or compiled."""

import contextlib
import os
import sys
from collections.abc import Iterator

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = ["test_*_compiled.py", "test_*_gpu.py"] if INTERPRETED else ["test_*_interpreted.py"]

if INTERPRETED:
    from tests.ops import recording

    recording.record_kernels()

    @pytest.fixture(autouse=True)
    def _checked_nodes(request: pytest.FixtureRequest) -> Iterator[None]:
        # torch.compile leaves alone what a mode looks at.
        with contextlib.nullcontext() if "compiled" in request.node.name else recording.CheckedNodes():
            yield


@pytest.fixture(autouse=True)
def _kernels_compiled() -> Iterator[None]:
    """Kernels that compile in threads are waited for: Triton sets filters of warnings there, for all threads."""
    yield
    module = sys.modules.get("farspan.ops._launch")
    for begun in list(module._pending.values()) if module else ():
        begun.exception()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The test of what all others have run comes last."""
    items.sort(key=lambda item: "test_every_kernel" in item.nodeid)
