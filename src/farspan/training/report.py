"""A run directory as one HTML file that needs nothing else: no network, no script, plots drawn inside it."""

import html
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from farspan.errors import CheckpointError
from farspan.evaluation.loading import read_run
from farspan.training import plots
from farspan.training.logs import duration, quantity, read_metrics
from farspan.training.plots import Line, Plot
from farspan.training.recipe import load_recipe
from farspan.training.run import write_text

_STYLE = """
:root { color-scheme: light; --ink: #1c2430; --soft: #5b6472; --line: #e3e7ec; --paper: #fff; --back: #f5f6f8 }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
main { max-width: 1060px; margin: 0 auto; padding: 40px 20px 80px }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.015em }
h2 { font-size: 17px; margin: 44px 0 12px; letter-spacing: -.005em }
p { margin: 0 0 12px; color: var(--soft) }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 12px; margin: 26px 0 0 }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px }
.numbers b { display: block; font-size: 22px; line-height: 1.25; letter-spacing: -.01em }
.numbers span { font-size: 12.5px; color: var(--soft) }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 12px }
.plots svg { display: block; width: 100%; height: auto }
.wide { grid-column: 1 / -1 }
.tables { columns: 2 400px; column-gap: 12px } .tables .card { break-inside: avoid; margin-bottom: 12px }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding-bottom: 8px }
td, th { padding: 5px 14px 5px 0; border-top: 1px solid var(--line); text-align: left; vertical-align: top }
th { font-weight: 400 }
td { overflow-wrap: anywhere }
th { color: var(--soft); white-space: nowrap }
thead th { border-top: 0; font-size: 12.5px }
.right td, .right thead th { text-align: right } .right th:first-child { text-align: left }
pre { margin: 0; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; tab-size: 4 }
pre mark { background: #e8effd; color: inherit; border-radius: 3px }
.below { margin-top: 12px }
.sample { margin-bottom: 12px }
.sample small { display: block; color: var(--soft); margin-bottom: 6px }
"""


def write_report(run_dir: Path | str) -> Path:
    """Writes `report.html` into a run directory, from the files that are there.

    It reads recipe.yaml, run.json and metrics.jsonl, and where they exist evaluation/*.json, samples.json and
    samples.txt; call it again when more of them have appeared.

    Args:
        run_dir: The run directory.

    Returns:
        Path of the report.

    Raises:
        CheckpointError: The directory holds no run.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "recipe.yaml").is_file():
        raise CheckpointError(f"{str(run_dir)!r} holds no recipe.yaml, so there is no run to report on.")
    recipe = load_recipe(run_dir / "recipe.yaml").to_dict()
    about, rows = read_run(run_dir), read_metrics(run_dir / "metrics.jsonl")
    steps = [row for row in rows if row["kind"] == "train"]
    scores = [row for row in rows if row["kind"] != "train"]
    sections = [
        _header(recipe["name"], about, steps, scores),
        _curves(steps, scores),
        _evaluation(_read_json(run_dir / "evaluation" / "evaluation.json")),
        _samples(run_dir),
        _configuration(recipe, about),
    ]
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(recipe['name'])}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )
    path = run_dir / "report.html"
    write_text(path, page)
    return path


def _text(value: Any) -> str:
    return html.escape(str(value))


def _header(name: str, about: dict[str, Any], steps: list[dict[str, Any]], scores: list[dict[str, Any]]) -> str:
    """Title, one sentence and the numbers that matter most."""
    numbers: list[tuple[str, str]] = []
    if scores:
        numbers.append((f"{scores[-1]['bits_per_byte']:.3f}", "bits per byte, valid split"))
        numbers.append((f"{scores[-1]['perplexity']:.2f}", "perplexity per token"))
    if "parameters" in about:
        numbers.append((quantity(about["parameters"]), "parameters"))
    if steps:
        speed = statistics.median(row["tokens_per_second"] for row in steps)
        work = statistics.median(row["flops_per_second"] for row in steps)
        numbers += [
            (quantity(steps[-1]["tokens"]), "tokens read"),
            (duration(steps[-1]["seconds"]), "training time"),
            (quantity(speed), "tokens per second"),
            (quantity(work), "FLOP per second"),
        ]
        if "mfu" in steps[-1]:
            numbers.append((f"{statistics.median(row['mfu'] for row in steps):.1%}", "of the device's peak"))
    state = "finished" if about.get("bits_per_byte") is not None else "not finished"
    corpus = about.get("corpus", {}).get("name", "unknown text")
    line = f"Trained on {corpus}, {state} after {steps[-1]['step'] if steps else 0} steps."
    cards = "".join(
        f'<div class="card"><b>{_text(value)}</b><span>{_text(label)}</span></div>' for value, label in numbers
    )
    return f'<h1>{_text(name)}</h1>\n<p>{_text(line)}</p>\n<div class="numbers">{cards}</div>'


def _curves(steps: list[dict[str, Any]], scores: list[dict[str, Any]]) -> str:
    """The curves of training."""
    if not steps:
        return ""
    x = [row["step"] for row in steps]
    window = max(1, len(x) // 50)

    def curve(title: str, key: str, color: str, **options: Any) -> str:
        y = [row[key] for row in steps]
        label = f"mean of {window} steps" if window > 1 else ""
        smoothed = Line(x, plots.smooth(y, window), label=label, color=color)
        return plots.svg(Plot(title, [Line(x, y, color=color, faint=True), smoothed], **options), *size)

    size = (12.4, 3.6)
    drawn = [("wide", curve("Training loss, nats per token", "loss", plots.BLUE))]
    size = (6.2, 2.9)
    if scores:
        line = Line([s["step"] for s in scores], [s["bits_per_byte"] for s in scores], color=plots.ORANGE, dots=True)
        drawn.append(("", plots.svg(Plot("Valid split, bits per byte", [line]), *size)))
    rate = Line(x, [row["learning_rate"] for row in steps], color=plots.GREEN)
    drawn += [
        ("", plots.svg(Plot("Learning rate", [rate], start_at_zero=True), *size)),
        ("", curve("Throughput, tokens per second", "tokens_per_second", plots.BLUE, start_at_zero=True)),
        ("", curve("Norm of the gradient, before clipping", "grad_norm", plots.GREY)),
    ]
    return f"<h2>Training</h2>\n{_cards(drawn)}"


def _cards(drawn: list[tuple[str, str]]) -> str:
    """Drawings side by side; those of kind "wide" take the whole width."""
    cards = "".join(f'<div class="card {kind}">{drawing}</div>' for kind, drawing in drawn)
    return f'<div class="plots">{cards}</div>'


def _evaluation(found: Any) -> str:
    """What `farspan eval` measured: the baselines on the same text, and perplexity by context length."""
    try:
        return _baselines(found) + "\n" + _by_length(found["context"], found["data"]["split"])
    except (KeyError, TypeError, ValueError):
        return ""  # absent, or written by another version


def _baselines(found: dict[str, Any]) -> str:
    rows = [("this model", _number(found["bits"]["bits_per_byte"], 4), f"windows of {found['bits']['window']} tokens")]
    rows += [(row["name"], _number(row["bits_per_byte"], 4), row["method"]) for row in found["baselines"]]
    return f'<h2>Evaluation</h2>\n<div class="card scroll">{_rows(("model", "bits per byte", "how"), rows)}</div>'


def _by_length(context: dict[str, Any], split: str) -> str:
    cells = [(f"sliding window, stride {context['stride']}", cell) for cell in context["sliding"]]
    cells += [(f"last {context['suffix_tokens']} tokens", cell) for cell in context["suffix"]]
    cells += [("state carried over windows", context["carried"])] if context["carried"] else []
    rows = [
        (protocol, f"{cell['length']:,}", _number(cell["perplexity"]), f"{cell['tokens']:,}")
        for protocol, cell in cells
    ]
    by_length = _length_plot("Perplexity by length of the context", "tokens of context", context, "sliding", "suffix")
    by_position = _length_plot("Perplexity by position in the text", "position", context, "position")
    return (
        f"<h2>Beyond the trained length</h2>\n"
        f"<p>{context['texts']} {_text(context['kind'])} of {context['text_length']:,} tokens, {_text(split)} split; "
        f"trained on sequences of {context['trained_length']:,} tokens.</p>\n"
        f"{_cards([('', plots.svg(plot)) for plot in (by_length, by_position) if plot.lines])}\n"
        f'<div class="card scroll right below">{_rows(("protocol", "context", "perplexity", "tokens"), rows)}</div>'
    )


def _length_plot(title: str, x_label: str, context: dict[str, Any], *protocols: str) -> Plot:
    """Perplexity over the length, one line per protocol; cells that are not finite leave a gap."""
    names = {"sliding": "sliding window", "suffix": f"last {context['suffix_tokens']} tokens", "position": ""}
    lines = [
        Line(
            [cell["length"] for cell in context[protocol]],
            [float(cell["perplexity"]) for cell in context[protocol]],
            label=names[protocol],
            color=color,
            dots=True,
        )
        for protocol, color in zip(protocols, (plots.BLUE, plots.ORANGE), strict=False)
        if context[protocol]
    ]
    return Plot(title, lines, x_label, log_x=True, marks={context["trained_length"]: "trained length"})


def _samples(run_dir: Path) -> str:
    """What the model wrote, if samples were kept: those of `farspan generate --json`, or any text."""
    samples = _read_json(run_dir / "samples.json")
    if not isinstance(samples, list):
        path = run_dir / "samples.txt"
        samples = [path.read_text(encoding="utf-8", errors="replace")] if path.is_file() else []
    blocks = []
    for sample in samples:
        fields = sample if isinstance(sample, dict) else {"text": sample}
        options = fields.get("options") or {}
        settings = {name: fields.get(name, options.get(name)) for name in ("seed", "temperature", "top_p", "tokens")}
        caption = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
        prompt = f"<mark>{_text(fields['prompt'])}</mark>" if fields.get("prompt") else ""
        text = f"{prompt}{_text(fields.get('text', ''))}"
        blocks.append(f'<div class="card sample"><small>{_text(caption)}</small><pre>{text}</pre></div>')
    return "<h2>Samples</h2>\n" + "\n".join(blocks) if blocks else ""


def _configuration(recipe: dict[str, Any], about: dict[str, Any]) -> str:
    """Everything that would be needed to do it again."""
    facts: dict[str, Any] = {
        name: about[name] for name in ("command", "device", "threads", "precision") if about.get(name)
    }
    facts |= {f"{name} version": version for name, version in about.get("versions", {}).items()}
    corpus = about.get("corpus", {})
    if corpus:
        facts |= {
            "corpus": corpus["name"],
            "corpus fingerprint": corpus["fingerprint"],
            "tokenizer": corpus["tokenizer"],
        }
        for name, counts in corpus["splits"].items():
            facts[f"{name} split"] = ", ".join(f"{quantity(count)} {what}" for what, count in counts.items())
    tables = [_table("Environment and data", facts)]
    for section, values in recipe.items():
        if isinstance(values, dict):
            tables.append(_table(section, {k: v for k, v in values.items() if v is not None and v != {}}))
    return f'<h2>Configuration</h2>\n<div class="tables">{"".join(tables)}</div>'


def _table(caption: str, values: dict[str, Any]) -> str:
    shown = {name: ", ".join(map(str, v)) if isinstance(v, list) else v for name, v in values.items()}
    rows = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in shown.items())
    return f'<div class="card"><table><caption>{_text(caption)}</caption>{rows}</table></div>'


def _rows(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table with a head."""
    head = "".join(f"<th>{_text(name)}</th>" for name in heads)
    body = "".join(
        f"<tr><th>{_text(row[0])}</th>{''.join(f'<td>{_text(value)}</td>' for value in row[1:])}</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _number(value: float | str, digits: int = 2) -> str:
    """A measured number; "inf" and "nan" are results too."""
    number = float(value)
    return f"{number:.{digits}f}" if abs(number) < 1e5 else f"{number:.2e}"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return None  # absent, or not ours to judge
