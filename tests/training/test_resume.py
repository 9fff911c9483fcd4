"""A run that was interrupted, however that happened, logs the same digits as one that was not."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import filesystem

from farspan.errors import CheckpointError, ConfigError, DataError
from farspan.training import loop
from farspan.training.checkpoint import complete_checkpoints, latest_checkpoint
from farspan.training.loop import train
from farspan.training.recipe import Recipe

Tiny = Callable[..., Recipe]
History = Callable[[Path], list[dict[str, Any]]]


class Crash(BaseException):
    """Stands for the death of the process: nothing in the library catches it."""


def crash_before(step: int, monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Calls `act` when the loop is about to take a step."""
    original = loop.optimizer_step

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs["step"] == step:
            act()
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "optimizer_step", wrapped)


def raise_crash() -> None:
    raise Crash


@pytest.fixture
def uninterrupted(tiny: Tiny, history: History) -> list[dict[str, Any]]:
    recipe = tiny("uninterrupted")
    train(recipe)
    rows = history(recipe.run_dir)
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 13))
    assert [(row["kind"], row["step"]) for row in rows if row["kind"] != "train"] == [
        ("evaluation", 5),
        ("evaluation", 10),
        ("final", 12),
    ]
    return rows


@pytest.fixture
def stopped(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A run that died after step 4; its only checkpoint is that of step 3."""
    recipe = tiny("stopped")
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_before(5, patch, raise_crash)
        train(recipe)
    return recipe


@pytest.mark.parametrize("step", [1, 3, 4, 9, 12])
def test_a_crash_changes_no_digit(
    step: int,
    tiny: Tiny,
    history: History,
    uninterrupted: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = tiny("crashed")
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_before(step, patch, raise_crash)
        train(recipe)
    assert not (recipe.run_dir / "config.json").exists()  # no model is promised yet
    random.random(), torch.rand(1)  # another process would not have these generators either
    train(recipe)
    assert history(recipe.run_dir) == uninterrupted


def test_a_crash_during_the_final_evaluation_changes_no_digit(
    tiny: Tiny, history: History, uninterrupted: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny("crashed")
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(loop, "export_model", lambda *args: raise_crash())
        train(recipe)
    assert history(recipe.run_dir)[-1]["kind"] == "final"
    train(recipe)
    assert history(recipe.run_dir) == uninterrupted


def test_half_written_checkpoints_are_never_read(
    tiny: Tiny, history: History, uninterrupted: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny("crashed")
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_before(8, patch, raise_crash)
        train(recipe)
    folder = recipe.run_dir / "checkpoints"
    whole = latest_checkpoint(folder)
    assert whole is not None and whole.name == "step_00000006"
    # What a kill leaves behind: the temporary name with everything but the last file, or even with it.
    for name, kept in {"step_00000009.partial": False, "step_00000012.partial": True, "step_00000009": False}.items():
        shutil.copytree(whole, folder / name)
        if not kept:
            (folder / name / ".metadata").unlink()
    with (recipe.run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "step": 8, "lo')
    assert latest_checkpoint(folder) == whole
    train(recipe)
    assert history(recipe.run_dir) == uninterrupted
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000009", "step_00000012"]


def test_only_the_newest_checkpoints_are_kept(tiny: Tiny) -> None:
    recipe = tiny(checkpoint={"save_steps": 2, "save_total_limit": 3})
    train(recipe)
    names = [path.name for path in complete_checkpoints(recipe.run_dir / "checkpoints")]
    assert names == ["step_00000008", "step_00000010", "step_00000012"]


def test_a_damaged_checkpoint_is_named(stopped: Recipe) -> None:
    weights = stopped.run_dir / "checkpoints/step_00000003/__0_0.distcp"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"step_00000003' cannot be read: __0_0.distcp is damaged.*Delete that"):
        train(stopped)


def damage(path: Path) -> None:
    """Flips one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "rank_0.pt", "progress.json", "checksums.json"])
def test_one_wrong_bit_in_a_checkpoint_is_noticed(name: str, stopped: Recipe) -> None:
    damage(stopped.run_dir / "checkpoints/step_00000003" / name)
    with pytest.raises(CheckpointError, match=r"step_00000003' cannot be read: \S.*\. Delete that folder"):
        train(stopped)


def test_a_checkpoint_under_the_name_of_another_step_is_refused(stopped: Recipe) -> None:
    folder = stopped.run_dir / "checkpoints"
    (folder / "step_00000003").rename(folder / "step_00000009")
    with pytest.raises(CheckpointError, match=r"step_00000009' cannot be read: its progress.json is that of step 3"):
        train(stopped)


def test_an_error_without_words_is_named_by_its_type(stopped: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise EOFError

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(CheckpointError, match=r"cannot be read: EOFError\. Delete"):
        train(stopped)


def test_a_damaged_log_is_refused_and_left_as_it_is(stopped: Recipe) -> None:
    path = stopped.run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for content in (b'{"kind": "tra\n', b"\xff\xfe\n", b"5\n", b'{"kind": "train"}\n'):
        path.write_bytes(b"".join([lines[0], content, *lines[2:]]))
        before = path.read_bytes()
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 2 is damaged"):
            train(stopped)
        assert path.read_bytes() == before


def test_a_log_that_lacks_steps_is_noted(stopped: Recipe, capsys: pytest.CaptureFixture[str], changed: Any) -> None:
    path = stopped.run_dir / "metrics.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    train(changed(stopped, "logging", progress="plain"))
    assert "metrics.jsonl lacks 2 of the 3 steps before" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(
    number: signal.Signals,
    tiny: Tiny,
    history: History,
    uninterrupted: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = tiny("stopped")
    with monkeypatch.context() as patch:
        crash_before(8, patch, lambda: os.kill(os.getpid(), number))
        train(recipe)
    assert history(recipe.run_dir)[-1]["step"] == 8
    assert latest_checkpoint(recipe.run_dir / "checkpoints").name == "step_00000008"
    assert (recipe.run_dir / "config.json").exists()  # what there is can be tried out
    assert not json.loads((recipe.run_dir / "run.json").read_text())["finished"]
    train(recipe)
    assert history(recipe.run_dir) == uninterrupted


def test_a_finished_run_is_left_alone(tiny: Tiny, capsys: pytest.CaptureFixture[str], changed: Any) -> None:
    recipe = changed(tiny(), "logging", progress="plain")
    train(recipe)
    before = {path: path.stat().st_mtime_ns for path in recipe.run_dir.rglob("*") if path.is_file()}
    capsys.readouterr()
    train(recipe)
    assert "is finished; nothing to do" in capsys.readouterr().out
    changes = {path for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert {path.name for path in changes} <= {".lock"}


def test_another_recipe_is_refused_by_the_names_of_its_differences(tiny: Tiny, changed: Any) -> None:
    recipe = tiny()
    train(recipe)
    other = changed(changed(recipe, "train", learning_rate=0.5), "model", mixers=["softmax"])
    with pytest.raises(ConfigError, match=r"train.learning_rate \(was 0.001, now 0.5\).*--resume never") as refused:
        train(other)
    assert "model.mixers" in str(refused.value)
    # What is only watched may change.
    train(changed(changed(recipe, "checkpoint", save_steps=4), "evaluation", eval_steps=0))


def test_a_longer_run_goes_on_as_if_it_had_been_so_long_from_the_start(
    tiny: Tiny, history: History, changed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tiny("whole", train={"lr_scheduler_type": "constant"})
    train(whole)
    short = tiny("extended", train={"lr_scheduler_type": "constant", "max_steps": 7}, logging={"progress": "plain"})
    longer = changed(short, "train", max_steps=12)
    for recipe, said in ((short, "starting in"), (longer, "to 12 steps where it had 7"), (longer, "is finished")):
        train(recipe)
        assert said in capsys.readouterr().out
    assert history(short.run_dir) == history(whole.run_dir)


def test_a_length_that_a_run_has_passed_is_refused(tiny: Tiny, changed: Any) -> None:
    recipe = tiny()
    train(recipe)
    with pytest.raises(ConfigError, match=r"train.max_steps: .* has done 12 steps, and would have 5; give 12 or more"):
        train(changed(recipe, "train", max_steps=5))
    shutil.rmtree(recipe.run_dir / "checkpoints")
    with pytest.raises(CheckpointError, match=r"is finished and has no checkpoint to go on from; .*from-pretrained"):
        train(changed(recipe, "train", max_steps=15))


def test_never_moves_the_earlier_run_aside(tiny: Tiny, history: History, changed: Any) -> None:
    recipe = tiny()
    train(recipe)
    before = history(recipe.run_dir)
    train(changed(recipe, "train", seed=1), resume="never")
    assert history(Path(f"{recipe.run_dir}.1")) == before != history(recipe.run_dir)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("model", {"mixers": ["none"]}),
        ("data", {"corpus": "nowhere", "directory": None}),
        ("data", {"valid_fraction": 0.0, "directory": None}),
        ("train", {"warmup_steps": 99}),
    ],
)
def test_never_leaves_the_earlier_run_where_it_is_if_none_can_start(
    section: str, values: dict[str, Any], tiny: Tiny, changed: Any
) -> None:
    recipe = tiny()
    recipe.run_dir.mkdir()
    (recipe.run_dir / "recipe.yaml").write_text(recipe.to_yaml())
    (recipe.run_dir / "model.safetensors").write_bytes(b"weights")
    with pytest.raises((ConfigError, DataError)):
        train(changed(recipe, section, **values), resume="never")
    assert (recipe.run_dir / "model.safetensors").read_bytes() == b"weights"
    assert [path.name for path in recipe.run_dir.parent.iterdir()] == ["run"]


def test_must_refuses_to_start(tiny: Tiny) -> None:
    with pytest.raises(CheckpointError, match="does not exist, so there is nothing to resume"):
        train(tiny(), resume="must")


def test_a_foreign_directory_is_not_written_to(tiny: Tiny) -> None:
    recipe = tiny()
    recipe.run_dir.mkdir()
    (recipe.run_dir / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds config\.json but no recipe\.yaml"):
        train(recipe)
    assert (recipe.run_dir / "config.json").read_text() == "{}"


def test_two_processes_cannot_share_a_run(tiny: Tiny) -> None:
    fcntl = pytest.importorskip("fcntl")
    recipe = tiny()
    recipe.run_dir.mkdir()
    with (recipe.run_dir / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another process is training"):
            train(recipe)


@pytest.mark.parametrize("place", ["weights", "sidecar", "log"])
def test_a_full_disk_is_one_message_and_loses_nothing(
    place: str,
    tiny: Tiny,
    history: History,
    uninterrupted: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = tiny("full")
    full = OSError(errno.ENOSPC, "No space left on device")

    def fill_the_disk() -> None:
        while not list(recipe.run_dir.glob("checkpoints/step_00000003*/.metadata")):
            time.sleep(0.001)  # the checkpoint of step 3 gets through, that of step 6 will not

        def fail(*args: Any, **kwargs: Any) -> None:
            raise full

        if place == "weights":
            patch.setattr(filesystem, "_write_item", fail)
        elif place == "sidecar":
            patch.setattr(torch, "save", fail)
        else:
            patch.setattr(loop.MetricsLog, "write", fail)

    with (
        monkeypatch.context() as patch,
        pytest.raises(CheckpointError, match=r"(?i)no space left|the disk is full") as error,
    ):
        crash_before(4, patch, fill_the_disk)
        train(recipe)
    assert "intact" in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in (recipe.run_dir / "checkpoints").iterdir()] == ["step_00000003"]
    train(recipe)
    assert history(recipe.run_dir) == uninterrupted


@pytest.mark.slow
def test_kill_9_at_random_steps_changes_no_digit(tiny: Tiny, history: History, changed: Any) -> None:
    steps = 150
    kept = {"name": "kept", "train": {"max_steps": steps}, "checkpoint": {"save_steps": 7}}
    whole, killed = tiny(**kept), tiny(**{**kept, "name": "killed"})
    draw = random.Random(int(time.time()))
    assert start(whole).wait() == 0
    log = killed.run_dir / "metrics.jsonl"
    for end in sorted(draw.sample(range(5, steps - 20), 3)):
        process = start(killed)
        while process.poll() is None and (not log.exists() or log.read_bytes().count(b'"train"') < end):
            time.sleep(draw.uniform(0, 0.004))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert start(killed).wait() == 0
    assert history(killed.run_dir) == history(whole.run_dir)
    assert len(history(killed.run_dir)) > steps


@pytest.mark.slow
def test_a_second_signal_ends_the_run_at_once(tiny: Tiny) -> None:
    process = start(tiny(train={"max_steps": 10**6}))
    log = tiny().run_dir / "metrics.jsonl"
    while not log.exists() or log.stat().st_size == 0:
        time.sleep(0.05)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.0005)
    # The second one may come while a step is taken (killed), while the run is saved (130) or after it (0).
    assert process.wait(timeout=30) in (-signal.SIGINT, 130, 0)


def start(recipe: Recipe) -> "subprocess.Popen[bytes]":
    """A recipe in a process of its own."""
    path = recipe.run_dir.with_suffix(".yaml")
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    program = "import sys; from farspan.cli.main import main; sys.exit(main(['train', sys.argv[1]]))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", program, str(path)], env=environment)
