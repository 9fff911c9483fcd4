"""The results of an evaluation as tables for the terminal."""

from rich.table import Table

from farspan.evaluation.context_length import Cell
from farspan.evaluation.evaluate import ContextLengths, Evaluation


def context_tables(context: ContextLengths) -> dict[str, Table]:
    """One table per protocol that was measured, by its title."""
    texts = f"{context.texts} {context.kind}, {context.text_length:,} tokens each"
    tables: dict[str, Table] = {}
    if context.sliding:
        title = f"perplexity by context length (sliding window, stride {context.stride:,}; {texts})"
        tables[title] = _table("window", context.sliding, context.trained_length)
    if context.carried is not None:
        title = f"state carried over windows of {context.trained_length:,} tokens ({texts})"
        tables[title] = _table("tokens seen", [context.carried], context.trained_length)
    if context.position:
        title = f"perplexity by position ({texts})"
        tables[title] = _table("position", context.position, context.trained_length)
    if context.suffix:
        title = f"perplexity of the last {context.suffix_tokens:,} tokens after longer prefixes ({texts})"
        tables[title] = _table("context", context.suffix, context.trained_length)
    return tables


def summary_table(evaluation: Evaluation) -> tuple[str, Table]:
    """Bits per byte of the model next to the baselines: title and table."""
    bits, data = evaluation.bits, evaluation.data
    title = f"bits per byte on {data['corpus']}, {data['split']} split, {bits.bytes:,.0f} bytes"
    table = Table()
    table.add_column("model")
    table.add_column("bits per byte", justify="right")
    table.add_column("how", overflow="fold")
    sample = "" if bits.windows == bits.all_windows else f", {bits.windows:,} of {bits.all_windows:,} windows"
    how = f"windows of {bits.window:,} tokens, perplexity {number(bits.perplexity)} per token{sample}"
    table.add_row(evaluation.model["name"], f"{bits.bits_per_byte:.4f}", how, style="bold")
    for baseline in evaluation.baselines:
        table.add_row(baseline.name, f"{baseline.bits_per_byte:.4f}", baseline.method)
    return title, table


def number(value: float) -> str:
    """A perplexity in four digits, or in powers of ten where that is clearer."""
    return f"{value:,.2f}" if 0.01 <= abs(value) < 1e5 else f"{value:.2e}"


def _table(what: str, cells: list[Cell], trained: int) -> Table:
    table = Table()
    for name in (what, "× trained", "perplexity", "nats/token", "tokens scored"):
        table.add_column(name, justify="right")
    for cell in cells:
        place = f"{cell.start:,} – {cell.length - 1:,}" if what == "position" else f"{cell.length:,}"
        measured = [number(cell.perplexity), f"{cell.mean_nll:.4f}"] if cell.status == "ok" else [cell.status, ""]
        table.add_row(place, f"{cell.length / trained:g}", *measured, f"{cell.tokens:,}")
    return table
