"""`farspan bench ops` measures every operator, names what it cannot, and writes what it found."""

import dataclasses
import importlib
import json
from math import inf
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from farspan.cli.main import main
from farspan.evaluation import op_speed as op_speed_module
from farspan.evaluation import op_tune
from farspan.evaluation.op_cases import CASES, chosen
from farspan.evaluation.op_speed import OpSpeed, cold_first_call, op_speed
from farspan.evaluation.op_workload import Leaves, OpCase, Workload
from farspan.ops import _tiles

CPU = torch.device("cpu")


def test_every_operator_is_measured_and_every_missing_peer_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, picture = tmp_path / "speed.json", tmp_path / "speed.png"
    arguments = ["--shapes", "1x16", "2x8", "--repeats", "1", "--device", "cpu"]
    assert main(["bench", "ops", *arguments, "--json", str(table), "--plot", str(picture)]) == 0
    found = json.loads(table.read_text())
    assert {row["operator"] for row in found["speeds"]} == set(CASES)
    for row in found["speeds"]:
        if CASES[row["operator"]].missing(CPU) is None:
            assert row["note"] == ""
            assert row["forward_ms"] > 0
            assert row["operator"] == "expiry" or row["both_ms"] > 0
        else:
            assert row["forward_ms"] is None
            assert row["note"]
    assert set(found["ceilings"]) == {"copy_gigabytes_per_second", "matmul_teraflops_per_second"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "…" not in shown  # 80 columns hold every name and every number
    begins = {line.strip().removesuffix("1x16").strip() for line in (line[:25] for line in shown.splitlines())}
    assert set(CASES) <= begins


def test_named_operators_bring_their_peers() -> None:
    assert set(chosen(("softmax",), True)) == {"softmax", "sdpa flash", "sdpa cudnn"}
    assert set(chosen(("softmax",), False)) == {"softmax"}


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if n != "expiry" and case.missing(CPU) is None])
def test_every_input_has_a_gradient_that_can_be_forgotten(name: str) -> None:
    workload = CASES[name].make(2, 8, torch.float32, CPU)
    workload.call(workload.leaves).sum().backward()
    inputs = (*workload.leaves.values(), *workload.parameters)
    assert all(x.grad is not None and x.grad.shape == x.shape for x in inputs)
    assert workload.flops > 0
    workload.forget()
    assert all(x.grad is None for x in inputs)


def test_rates_follow_from_the_times() -> None:
    leaves = {"x": torch.ones(4, 250, requires_grad=True)}
    case = OpCase(lambda *_: Workload(leaves, lambda x: 2 * x["x"], flops=1e6, backward=2.0))
    speed = op_speed("double", case, 1, 1, torch.float32, CPU, repeats=3)
    assert speed.gigabytes_per_second == pytest.approx(2 * 4000 / (speed.forward_ms / 1000) / 1e9)
    assert speed.teraflops_per_second == pytest.approx(3e6 / (speed.both_ms / 1000) / 1e12)


def test_what_fails_is_a_note_and_not_the_end() -> None:
    def fail(*_: object) -> Workload:
        raise RuntimeError("out of memory\nwith details")

    speed = op_speed("broken", OpCase(fail), 1, 8, torch.float32, CPU)
    assert (speed.forward_ms, speed.note) == (None, "out of memory")


@pytest.mark.slow
def test_a_cold_first_call_is_that_of_another_process() -> None:
    assert 0 < cold_first_call("softmax", 1, 8, torch.float32, CPU) < 60
    with pytest.raises(RuntimeError, match="KeyError: 'unknown'"):
        cold_first_call("unknown", 1, 8, torch.float32, CPU)


def test_a_process_that_dies_without_a_word_is_told_by_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_speed_module, "_FIRST_CALL", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(RuntimeError, match="the first call in a new process failed: it ended with code -9"):
        cold_first_call("softmax", 1, 8, torch.float32, CPU)


@pytest.mark.parametrize("name", ["ops_gpu", "attention_gpu"])
def test_the_benchmarks_measure_what_there_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    benchmark = importlib.import_module(name)
    assert set(benchmark.CHECKS) <= set(benchmark.ROWS)
    figures = {field.name for field in dataclasses.fields(OpSpeed)}
    for row in (row for rows in benchmark.ROWS.values() for row in rows):
        assert row.case in CASES
        assert row.peer is None or CASES[row.peer].peer_of is not None
        assert set(row.most) <= figures
        assert row.peer is not None or (row.slower, row.faster, row.leaner) == (None, None, None)


def test_a_limit_is_met_by_a_figure_alone_and_errors_are_held_to_twice_the_other_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    acceptance = importlib.import_module("acceptance")
    values = (("at most", 1.0, True), ("at most", 1.1, False), ("at least", 0.9, False), ("at least", 1.0, True))
    for side, value, met in values:
        assert acceptance._limit("both_ms", value, side, 1.0)["met"] is met
    assert acceptance._limit("both_ms", None, "at most", 1.0)["met"] is False
    exact = {"out": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    near, twice, far = ({"out": exact["out"] + error} for error in (0.01, 0.0199, 0.0201))
    assert acceptance.errors_of(exact, [twice, twice], near)[1]
    assert not acceptance.errors_of(exact, [far, far], near)[1]
    errors, passed = acceptance.errors_of(exact, [near, {"out": near["out"] + 0.03}], near)  # runs that disagree
    assert not passed
    assert errors["out"]["kernel"] == pytest.approx(0.005)
    assert errors["out"]["between_runs"] == pytest.approx(0.015)


class Fake:
    """An operator whose tiles are fast, slow, wrong or refused."""

    SHIPPED, SLOW, FAST, WRONG, REFUSED = (64, 1), (64, 2), (64, 3), (64, 4), (64, 5)
    TIMES: ClassVar[dict[tuple[int, int], float]] = {SHIPPED: 1.0, SLOW: 1.5, FAST: 0.8, WRONG: 0.1, REFUSED: 0.1}

    @classmethod
    def tile(cls) -> tuple[int, int]:
        return _tiles.measured("fake.kernel", (), cls.SHIPPED, [cls.SLOW, cls.FAST, cls.WRONG, cls.REFUSED], 0)

    @classmethod
    def call(cls, x: Leaves) -> torch.Tensor:
        if cls.tile() == cls.REFUSED:
            raise RuntimeError("out of shared memory")
        return x["x"] * (2 if cls.tile() == cls.WRONG else 1)


def test_tuning_keeps_the_fastest_tile_that_is_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "card")
    monkeypatch.setenv("FARSPAN_TILES", str(tmp_path / "tiles.json"))
    monkeypatch.setattr(op_tune, "device_time", lambda step: Fake.TIMES[Fake.tile()])
    leaves = {"x": torch.ones(3, requires_grad=True)}
    monkeypatch.setitem(CASES, "fake", OpCase(lambda *_: Workload(leaves, Fake.call, 1.0)))
    seen = {}
    found = op_tune.tune(["fake"], torch.float32, CPU, lambda key, tile, ratio: seen.update({tile: ratio}))
    assert found == {"fake.kernel": Fake.FAST}
    assert seen == {Fake.SLOW: pytest.approx(1.5), Fake.FAST: pytest.approx(0.8), Fake.WRONG: inf, Fake.REFUSED: inf}
    assert Fake.tile() == Fake.SHIPPED


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["metalla"], "did you mean 'metala'"),
        (["metala", "--shapes", "1*8"], "ROWSxTOKENS"),
        (["metala", "--shapes", "1x8+checkpoint"], "training steps"),
        (["metala", "--repeats", "0"], "at least 1"),
        (["metala", "--plot", "speed.txt"], ".png, .svg or .pdf"),
        (["metala", "--tune", "--device", "cpu"], "NVIDIA GPUs only"),
    ],
)
def test_mistakes(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "ops", *arguments]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
