"""The report stands alone, shows what is there and survives what is not; the console shows a run either way."""

import io
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from farspan.errors import CheckpointError
from farspan.training import plots
from farspan.training.logs import Display, MetricsLog, duration, quantity, read_metrics
from farspan.training.plots import Line, Plot
from farspan.training.recipe import Recipe
from farspan.training.report import write_report


class Page(HTMLParser):
    """Collects tags and text, and whether every tag that was opened is closed again."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("href", "src", "xlink:href", "action")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of 200 steps as its files describe it."""
    recipe = Recipe(name='<wild> & "name"')
    recipe.model.mixer_options = {"metala": {"conv_size": 4}}
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    splits = {"train": {"documents": 9, "tokens": 12345, "bytes": 54321}}
    corpus = {"name": "letters", "fingerprint": "f" * 64, "tokenizer": "bpe:4096", "splits": splits}
    about = {"parameters": 3_005_664, "bits_per_byte": 1.61, "versions": {"torch": "2.13.0"}, "corpus": corpus}
    (tmp_path / "run.json").write_text(json.dumps(about))
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 201):
        speeds = {"tokens_per_second": 5000.0, "flops_per_second": 9e10, "seconds": step * 0.8, "tokens": step * 4096}
        numbers = {"loss": 8.0 / step + 2, "grad_norm": 1.0, "learning_rate": 1e-3}
        log.write({"kind": "train", "step": step, **numbers, **speeds})
        if step % 100 == 0:
            log.write({"kind": "evaluation", "step": step, "bits_per_byte": 2.0, "perplexity": 30.0, "windows": 4})
    log.write({"kind": "final", "step": 200, "bits_per_byte": 1.61, "perplexity": 21.0, "windows": 40})
    log.close()
    return tmp_path


def evaluation() -> dict[str, Any]:
    """The parts of evaluation.json that the report reads."""

    def cells(*perplexities: float | str) -> list[dict[str, Any]]:
        return [{"length": 256 * 2**i, "perplexity": value, "tokens": 99} for i, value in enumerate(perplexities)]

    context = {
        "trained_length": 512,
        "texts": 4,
        "text_length": 1024,
        "kind": "documents",
        "stride": 512,
        "suffix_tokens": 64,
        "sliding": cells(20.0, 19.0, "inf"),
        "position": cells(40.0, 20.0, "nan"),
        "suffix": cells(22.0, 21.5, 21.0),
        "carried": {"length": 1024, "perplexity": 18.123, "tokens": 99},
    }
    baselines = [{"name": "6-gram", "bits_per_byte": 2.4567, "method": "bytes"}]
    return {
        "bits": {"bits_per_byte": 1.6123, "window": 512},
        "baselines": baselines,
        "context": context,
        "data": {"split": "valid"},
    }


def test_the_report_stands_alone(run_dir: Path) -> None:
    (run_dir / "evaluation").mkdir()
    (run_dir / "evaluation/evaluation.json").write_text(json.dumps(evaluation()))
    sample = {"prompt": "def <", "text": "b>():\n\treturn", "seed": 7, "options": {"temperature": 0.7}}
    (run_dir / "samples.json").write_text(json.dumps([sample]))
    path = write_report(run_dir)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.tags.count("svg") == 7
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"https?:|//\w|url\((?!#)|@import", text)
    assert len(set(re.findall(r'\bid="([^"]+)"', text))) >= 7
    assert "&lt;wild&gt; &amp;" in text and "<wild>" not in text
    for shown in (
        "1.610",
        "3.01M",
        "6-gram",
        "2.4567",
        "18.12",
        "inf",
        "trained length",
        "temperature 0.7",
        "def &lt;",
    ):
        assert shown in text, shown
    assert "b&gt;():\n\treturn" in text and "f" * 64 in text and "conv_size" in text
    assert len(text) < 500_000


def test_no_identifier_of_a_plot_appears_twice_in_a_page(run_dir: Path) -> None:
    text = write_report(run_dir).read_text(encoding="utf-8")
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    clips = [set(re.findall(r'<clipPath id="([^"]+)"', drawing)) for drawing in drawings]
    assert sum(map(len, clips)) == len(set.union(*clips)) > 0


@pytest.mark.parametrize("missing", ["run.json", "metrics.jsonl"])
def test_the_report_does_without_what_is_missing(run_dir: Path, missing: str) -> None:
    (run_dir / missing).unlink()
    (run_dir / "samples.json").write_text("not JSON")
    (run_dir / "samples.txt").write_text("print(1 < 2)\n")
    (run_dir / "evaluation").mkdir()
    (run_dir / "evaluation/evaluation.json").write_text('{"bits": 1}')
    text = write_report(run_dir).read_text(encoding="utf-8")
    assert Page(text).open == [] and "print(1 &lt; 2)" in text


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no recipe"):
        write_report(tmp_path)


def test_a_report_that_cannot_be_written_leaves_the_old_one(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_report(run_dir).read_bytes()
    shutil.copy(run_dir / "metrics.jsonl", run_dir / "copy")
    (run_dir / "metrics.jsonl").write_text("")
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(Exception, match="disk is full"):
        write_report(run_dir)
    assert (run_dir / "report.html").read_bytes() == before


def test_equal_plots_give_equal_text_and_gaps_are_drawn() -> None:
    plot = Plot("t", [Line([1, 2, 4], [3.0, float("nan"), 1.0], dots=True)], log_x=True, marks={2: "here"})
    assert plots.svg(plot) == plots.svg(plot)
    assert "here" in plots.svg(plot) and "xmlns" not in plots.svg(plot)


def test_smoothing_is_the_mean_of_the_last_values() -> None:
    assert plots.smooth([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
    assert plots.smooth([], 2) == []


def test_the_log_is_cut_back_to_a_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 6):
        log.write({"kind": "train", "step": step})
    log.close()
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5]
    log = MetricsLog(path, after_step=3)
    log.write({"kind": "train", "step": 4, "again": True})
    log.close()
    assert [row.get("again", row["step"]) for row in read_metrics(path)] == [1, 2, 3, True]
    assert read_metrics(tmp_path / "absent") == []


@pytest.mark.parametrize("mode", ["live", "plain", "none"])
def test_the_display_shows_progress(mode: Any) -> None:
    console = Console(record=True, force_terminal=mode == "live", quiet=mode == "none", width=140, file=io.StringIO())
    display = Display(mode, every=2, console=console)
    display.start(total=4, done=0)
    for step in range(1, 5):
        speeds = {"tokens_per_second": 12345.0, "flops_per_second": 2e9, "mfu": 0.25}
        display.step({"step": step, "loss": 1.25, **speeds}, seconds_left=61)
    display.message("a [bold] word")
    display.close()
    display.close()
    text = console.export_text()
    if mode == "none":
        assert text == ""
    else:
        assert "a [bold] word" in text and "loss 1.2500" in text and "12.3 ktok/s" in text and "MFU 25.0%" in text
        assert "4/4" in text and (mode == "live" or "left 1:01" in text)


def test_numbers_for_people() -> None:
    assert [quantity(x) for x in (0, 7, 999.4, 12345, 3.0e6)] == ["0", "7", "999", "12.3k", "3M"]
    assert quantity(2.5e12, "FLOP/s") == "2.5 TFLOP/s" and quantity(12, "tok/s") == "12 tok/s"
    assert [duration(s) for s in (0.4, 61, 3600 + 62)] == ["0:00", "1:01", "1:01:02"]


def test_a_known_peak_is_needed_for_utilisation(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from farspan.training.logs import peak_flops

    device = torch.device("cuda", 0)
    names: Callable[[Any], str] = lambda _: "NVIDIA H200"  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_name", names)
    assert peak_flops(device, torch.bfloat16) == 989e12
    assert peak_flops(device, torch.float32) is None and peak_flops(torch.device("cpu"), torch.bfloat16) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Something")
    assert peak_flops(device, torch.bfloat16) is None
