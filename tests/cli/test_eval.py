"""`farspan eval` on a tiny run: what it measures, writes and shows."""

import json
import math
from pathlib import Path

import pytest

from farspan.cli.main import main
from farspan.data.dataset import open_dataset
from farspan.evaluation.evaluate import evaluate
from farspan.evaluation.loading import load_model
from farspan.evaluation.perplexity import bits_per_byte


def test_everything_at_once(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = workspace / "run"
    assert main(["eval", str(run), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    found = json.loads((run / "evaluation" / "evaluation.json").read_text())
    for name in ("context_length.png", "context_length.svg"):
        assert (run / "evaluation" / name).stat().st_size > 1000

    dataset = open_dataset(run / "data")
    expected = bits_per_byte(
        load_model(run), dataset.documents("valid"), window=32, end_of_document=dataset.metadata.end_of_document
    )
    assert found["bits"]["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
    assert found["bits"]["bits_per_byte"] == pytest.approx(
        json.loads((run / "run.json").read_text())["bits_per_byte"], rel=1e-6
    )  # the one definition: training ends with the same number
    assert found["command"] == f"farspan eval {run} --device cpu"
    assert found["data"]["fingerprint"] == dataset.metadata.fingerprint
    assert found["model"]["trained_length"] == 32
    assert {"farspan", "torch", "transformers", "python"} <= set(found["versions"])
    assert [one["name"] for one in found["baselines"]] == ["6-gram", "lzma after train", "lzma alone"]
    for one in found["baselines"]:
        assert f"{one['bits_per_byte']:.4f}" in text

    context = found["context"]
    lengths = [cell["length"] for cell in context["sliding"]]
    assert lengths[0] == 16 and 32 in lengths and lengths[-1] == context["text_length"] > 32
    assert {cell["tokens"] for cell in context["sliding"]} == {context["texts"] * context["text_length"]}
    assert sum(cell["tokens"] for cell in context["position"]) == context["texts"] * context["text_length"]
    assert context["carried"]["tokens"] == context["texts"] * context["text_length"]
    assert all(cell["status"] == "ok" for cell in [*context["sliding"], *context["position"], *context["suffix"]])
    # a window of the whole text, all its positions, and the state carried over it: the same tokens in the same context
    whole = context["sliding"][-1]["nll"]
    assert sum(cell["nll"] for cell in context["position"]) == pytest.approx(whole, rel=1e-5)
    assert context["carried"]["nll"] == pytest.approx(whole, rel=1e-5)
    report = (run / "report.html").read_text(encoding="utf-8")
    assert str(run / "report.html") in text and "<html" in report


def test_options(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = workspace / "run"
    options = (
        "--lengths 8 16 --stride 4 --protocols sliding --no-baselines --split test --max-windows 3 --dtype bfloat16"
    )
    assert main(["eval", str(run), "--device", "cpu", *options.split()]) == 0
    found = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert [cell["length"] for cell in found["context"]["sliding"]] == [8, 16]
    assert (found["context"]["stride"], found["data"]["split"], found["dtype"]) == (4, "test", "bfloat16")
    assert found["baselines"] == found["context"]["position"] == found["context"]["suffix"] == []
    assert found["context"]["carried"] is None
    assert (found["bits"]["windows"], found["bits"]["all_windows"] > 3) == (3, True)
    assert f"of {found['bits']['all_windows']} windows" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_other_text_is_tokenised_for_the_model(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = workspace / "run", workspace / "other"
    other.mkdir()
    for number in range(40):
        (other / f"{number}.txt").write_text("nothing but prose\n" * (number + 1))
    quick = ["--protocols", "sliding", "--no-baselines", "--device", "cpu"]
    assert main(["eval", str(run), "--data", str(other), *quick]) == 0
    found = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert found["data"]["corpus"] == str(other)
    assert main(["eval", str(run), "--data", str(run / "data"), *quick]) == 0  # a prepared dataset is used as it is


@pytest.mark.parametrize("fraction", [0.01, 0.99])  # whichever split the one file would fall into
def test_a_single_text_is_evaluated_as_a_whole(
    fraction: float, workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from farspan.data import corpora

    monkeypatch.setattr(corpora, "name_hash", lambda name, salt="": 1 - fraction)
    text = "nothing but prose\n" * 40
    (workspace / "one.txt").write_text(text)
    run = workspace / "run"
    assert main(["eval", str(run), "--data", str(workspace / "one.txt"), "--protocols", "sliding"]) == 0
    assert "all of them are evaluated, without baselines" in capsys.readouterr().err
    found = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert (found["data"]["split"], found["data"]["bytes"], found["bits"]["bytes"]) == ("train", len(text), len(text))
    assert found["baselines"] == []


def test_numbers_that_are_not_finite_are_written_as_text(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    import farspan.evaluation.evaluate as module

    def broken(directory: Path, **options: object) -> torch.nn.Module:
        model = load_model(directory)
        torch.nn.init.constant_(model.lm_head.weight, math.nan)
        return model

    monkeypatch.setattr(module, "load_model", broken)
    run = workspace / "run"
    path = evaluate(run, open_dataset(run / "data"), with_baselines=False).save(run)
    found = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["bits"]["bits_per_byte"] == "nan"
    assert found["context"]["sliding"][0]["status"] == "nan"
    assert main(["eval", str(run), "--no-baselines", "--device", "cpu"]) == 0  # shown and drawn as well
