"""Tables of tiles: the measured one where there is one, errors that say what to do, nothing remembered too long."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from farspan.errors import ConfigError
from farspan.ops import _tiles

SHIPPED, OTHER = (64, 4, 1, None), (128, 8, 2, None)
CARD = "NVIDIA Card 1"


@pytest.fixture(autouse=True)
def _card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: CARD)
    monkeypatch.delenv("FARSPAN_TILES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _tiles.forget()
    yield
    _tiles.forget()


def lookup() -> tuple[int | None, ...]:
    return _tiles.measured("op.kernel", (64, 2), SHIPPED, [OTHER], 0)


def write(content: object, path: Path | None = None) -> Path:
    path = path or _tiles.place(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_without_a_table_the_shipped_tile_is_taken() -> None:
    assert lookup() == SHIPPED


def test_a_table_is_written_and_read() -> None:
    path = write(_tiles.table({"op.kernel 64 2": OTHER}, CARD).decode())
    assert path.name == "nvidia-card-1.json"
    assert lookup() == OTHER
    assert _tiles.measured("op.kernel", (128, 2), SHIPPED, [OTHER], 0) == SHIPPED


def test_the_environment_names_another_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mine = write(_tiles.table({"op.kernel 64 2": OTHER}, CARD).decode(), tmp_path / "mine.json")
    assert lookup() == SHIPPED
    monkeypatch.setenv("FARSPAN_TILES", str(mine))
    assert lookup() == OTHER


def test_warps_and_stages_of_kernels_that_share_a_table_are_measured_too() -> None:
    pytest.importorskip("triton")
    from farspan.ops._launch import Constants
    from farspan.ops.gated_linear import rows

    constants = Constants({"BX": 64, "STAGES": 3})
    assert rows._schedule("walk.values", (64, 64, 2), constants, rows.WARPS, 0) == (constants, rows.WARPS)
    with _tiles.trial({"walk.values 64 64 2": (8, 2)}):
        assert rows._schedule("walk.values", (64, 64, 2), constants, rows.WARPS, 0) == ({"BX": 64, "STAGES": 2}, 8)
        assert _tiles.candidates()["walk.values 64 64 2"] == [(4, 3), *sorted({*rows.SCHEDULES} - {(4, 3)})]
    assert rows._schedule("walk.values", (64, 64, 2), constants, rows.WARPS, 0) == (constants, rows.WARPS)


def test_warps_and_stages_of_kernels_without_tiles_of_their_own_are_measured_too() -> None:
    pytest.importorskip("triton")
    from farspan.ops import _launch
    from farspan.ops.dynamic_mask.kernels import attend_kernel
    from farspan.ops.gated_linear.kernels import state_kernel

    constants = _launch.Constants({"D": 64, "PRECISION": "ieee", "SEGMENTS": (2, 4)})
    key = "dynamic_mask.attend_kernel D=64 PRECISION=ieee SEGMENTS=(2,4) 224"

    def asked() -> tuple[int, int]:
        return _launch._schedule(attend_kernel, constants, (2, 2, 4), 4, 3, 0)

    assert asked() == (4, 3)
    assert _tiles.candidates()[key] == [(4, 3), (2, 3), (4, 1), (4, 2), (4, 4), (8, 3)]
    _launch._compiled["a launch"] = None, ()
    with _tiles.trial({key: (8, 2)}):
        assert asked() == (8, 2)
        assert not _launch._compiled, "kernels of other warps are still there"
    assert asked() == (4, 3)
    assert _launch._schedule(state_kernel, constants, (2,), 4, 3, 0) == (4, 3)
    assert all("state_kernel" not in kernel for kernel in _tiles.candidates())


def test_tiles_on_trial_come_first_and_go_again() -> None:
    cleared: list[bool] = []
    _tiles.remembered(lambda: cleared.append(True))
    try:
        with _tiles.trial({"op.kernel 64 2": OTHER}):
            assert lookup() == OTHER
            assert _tiles.candidates() == {"op.kernel 64 2": [SHIPPED, OTHER]}
        assert lookup() == SHIPPED
        assert len(cleared) == 2
    finally:
        _tiles._forget.pop()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read"),
        ([1], "no table of tiles"),
        ({"format": 1, "device": CARD, "tiles": {"op.kernel 64 2": ["64"]}}, "no table of tiles"),
        ({"format": 1, "device": CARD, "tiles": {"op.kernel 64 2": [True, 4, 1, None]}}, "no table of tiles"),
        ({"format": 2, "device": CARD, "tiles": {}}, "format 2"),
        ({"format": 1, "device": "another", "tiles": {}}, "measured on 'another'"),
        ({"format": 1, "device": CARD, "tiles": {"op.kernel 64 2": [3, 4, 1, None]}}, r"\[64, 4, 1, None\]"),
    ],
)
def test_a_bad_table_is_refused_with_what_to_do(content: object, words: str) -> None:
    write(content)
    with pytest.raises(ConfigError, match=words) as caught:
        lookup()
    assert "--tune" in str(caught.value)
