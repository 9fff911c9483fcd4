"""Parity with the published implementations, for every case of the index.

`FARSPAN_GOLDEN=DIR pytest tests/golden` runs on any folder of the same form. A kind that nobody has heard of fails; a
kind that is still to be built stands in `PENDING` by name and is skipped, so that the list shrinks to nothing.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.golden import (
    cheems_cases,
    coca_cases,
    cottention_cases,
    dmattn_cases,
    doge_cases,
    experts_cases,
    longnet_cases,
    metala_cases,
    ssd_cases,
)
from tests.golden.case import Case

RUNNERS: dict[str, Callable[[Case], None]] = {
    "cheems.lm": cheems_cases.language_model,
    "coca.llama.attention": coca_cases.llama_attention,
    "coca.llama.decode": coca_cases.llama_decode,
    "coca.llama.lm": coca_cases.llama_lm,
    "coca.neox.attention": coca_cases.neox_attention,
    "coca.neox.decode": coca_cases.neox_decode,
    "coca.neox.lm": coca_cases.neox_lm,
    "coca.scores": coca_cases.scores,
    "cottention.bert.attention": cottention_cases.bert_attention,
    "cottention.bert.pretraining": cottention_cases.bert_pretraining,
    "cottention.bert.sequence_classification": cottention_cases.bert_sequence_classification,
    "cottention.gpt.attention": cottention_cases.gpt_attention,
    "cottention.gpt.decode": cottention_cases.gpt_decode,
    "cottention.gpt.lm": cottention_cases.gpt_lm,
    "cottention.op": cottention_cases.causal_op,
    "dmattn.fsa.attention": dmattn_cases.fsa_attention,
    "dmattn.fsa.kernel": dmattn_cases.fsa_kernel,
    "dmattn.hf.attention": dmattn_cases.top_per_row,
    "dmattn.sd1.attention": dmattn_cases.top_per_row,
    "dmattn.seed_doge.attention": dmattn_cases.seed_doge,
    "dmattn.seed_module.attention": dmattn_cases.seed_module,
    "doge.hf.lm": doge_cases.current_lm,
    "doge.sd1.lm": doge_cases.small_lm,
    "doge.seed.lm": doge_cases.seed_lm,
    "gated_linear_attention.op": metala_cases.gated_linear_attention_op,
    "dilated.attention": longnet_cases.attention,
    "dilated.op": longnet_cases.operator,
    "longnet.decoder.lm": longnet_cases.decoder_lm,
    "longnet.encoder": longnet_cases.encoder,
    "longvit.classifier": longnet_cases.longvit,
    "longnet.xpos_and_relative_bias": longnet_cases.xpos_and_relative_bias,
    "metala.hf.mixer": metala_cases.hf_mixer,
    "metala.hf.decode": metala_cases.hf_decode,
    "metala.hf.lm": metala_cases.hf_lm,
    "metala.neox.layer": metala_cases.neox_layer,
    "ssd.cheems.layer": ssd_cases.cheems_layer,
    "ssd.seed.module": ssd_cases.seed_module,
    "cdmoe.gate.module": experts_cases.cdmoe_gate,
    "cdmoe.gate_token_mixing.module": experts_cases.cdmoe_gate_token_mixing,
    "cdmoe.query_key.module": experts_cases.cdmoe_query_key,
    "gated_mlp.module": experts_cases.gated_mlp,
    "mlp.module": experts_cases.mlp,
    "peer.module": experts_cases.peer,
    "seimoe.module": experts_cases.seimoe,
}

PENDING = frozenset(
    [
        "task.sample",
    ]
)


def _index() -> tuple[Path, dict[str, dict[str, Any]]]:
    default = Path(__file__).resolve().parents[3] / "shared" / "golden"
    directory = Path(os.environ.get("FARSPAN_GOLDEN", default))
    path = directory / "index.json"
    return directory, json.loads(path.read_text()) if path.is_file() else {}


DIRECTORY, INDEX = _index()


@pytest.mark.skipif(not INDEX, reason=f"no golden data in {DIRECTORY}; set FARSPAN_GOLDEN")
@pytest.mark.parametrize("name", sorted(INDEX) or [""])
def test_golden(name: str) -> None:
    entry = INDEX[name]
    kind = entry["kind"]
    if kind in PENDING:
        pytest.skip(f"pending: {kind}")
    if not entry["required"]:
        pytest.skip(f"not required: {name} documents a defect of the reference")
    assert kind in RUNNERS, f"unknown kind {kind!r}; known: {sorted(RUNNERS)}, pending: {sorted(PENDING)}"
    RUNNERS[kind](Case.load(DIRECTORY, name, entry))


def test_no_kind_is_both_built_and_pending() -> None:
    assert not PENDING & RUNNERS.keys()
