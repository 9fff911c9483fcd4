"""Packing: the published encoder case by case, and what is ours: tails, counts, separated records."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farspan.data.packing import IGNORED, Padding, SampleEncoder, clean_text
from farspan.errors import ConfigError, DataError

texts = st.lists(st.text("abcdef", max_size=12), max_size=8)


def toy(text: str) -> list[int]:
    """The tokenizer of the golden cases."""
    return [3 + ord(character) % 90 for character in text]


def encoder(window: int, **options: Any) -> SampleEncoder:
    return SampleEncoder(toy, end_of_document=1, pad=0, window=window, **options)


def test_golden_cases(golden_directory: Path) -> None:
    path = golden_directory / "coca" / "packing.json"
    if not path.is_file():
        pytest.skip(f"no golden packing cases at {path}")
    golden = json.loads(path.read_text())
    for case in golden["cases"]:
        window = case["seq_length"] + (1 if case["load_raw_dataset"] else 0)
        ours = encoder(window, padding=case["padding_mode"], mode=case["mode"], keep_tail=False)
        found = []
        for record in golden["documents"][case["data"]]:
            samples = ours.add(record)
            found.append(
                {
                    "input_ids": [sample.input_ids.tolist() for sample in samples],
                    "loss_mask": [sample.loss_mask.tolist() for sample in samples],
                }
            )
        if case["error"]:  # the published encoder fails as soon as a window is full; this one goes on
            continue
        assert found == case["per_document_output"], case
        assert ours.tail.tolist() == case["leftover_input_ids_never_emitted"], case
        left = len(ours.tail)
        assert ours.finish() == []
        assert ours.report.dropped_tokens >= left


@given(texts, st.integers(2, 9))
def test_concat_loses_nothing_and_predicts_every_token_once(records: list[str], window: int) -> None:
    ours = encoder(window, padding="concat")
    samples = list(ours.samples({"text": text} for text in records))
    stream = [token for text in records for token in [*toy(text), 1]]
    examples = [sample.example(separate_documents=False) for sample in samples]
    labels = np.concatenate([example["labels"] for example in examples]) if examples else np.zeros(0)
    assert labels[labels != IGNORED].tolist() == stream[1:]
    assert ours.report.dropped_tokens == 0
    assert ours.report.samples == len(samples)


@given(texts, st.integers(2, 9))
def test_pack_keeps_whole_records_in_order_and_counts_the_rest(records: list[str], window: int) -> None:
    ours = encoder(window, padding="pack")
    samples = list(ours.samples({"text": text} for text in records))
    kept = [text for text in records if len(text) < window]
    found = [token for sample in samples for token in sample.input_ids[sample.loss_mask == 1].tolist()]
    assert found == [token for text in kept for token in [*toy(text), 1]]
    assert ours.report.records == len(records)
    assert ours.report.dropped_records == len(records) - len(kept)
    assert ours.report.padding == sum(int((sample.loss_mask == 0).sum()) for sample in samples)


@pytest.mark.parametrize("padding", ["padding", "concat", "pack"])
@given(records=texts, window=st.integers(2, 9))
def test_separated_records_restart_and_never_predict_each_other(
    padding: Padding, records: list[str], window: int
) -> None:
    for sample in encoder(window, padding=padding).samples({"text": text} for text in records):
        example = sample.example()
        assert {len(values) for values in example.values()} == {window - 1}
        positions = example["position_ids"].tolist()
        expected, starts = [], set(sample.starts.tolist())
        for place in range(window - 1):
            expected.append(0 if place == 0 or place in starts else expected[-1] + 1)
        assert positions == expected
        ends = [place for place in range(window - 1) if sample.input_ids[place] == 1]
        assert all(example["labels"][place] == IGNORED for place in ends)


def test_prompts_are_read_and_only_answers_are_learnt() -> None:
    record = {"system": "S", "prompt": "q", "answer": "a"}
    sft = next(encoder(120, mode="sft").samples([record]))
    marker = "<|role_start|>{}<|role_end|>".format
    whole = f"{marker('system')}S{marker('human')}q{marker('bot')}a"
    assert sft.input_ids[: len(whole) + 1].tolist() == [*toy(whole), 1]
    assert np.flatnonzero(sft.loss_mask).tolist() == [len(whole) - 1, len(whole)]
    plain = next(encoder(120, mode="pretrain").samples([record]))
    assert plain.input_ids[:4].tolist() == [*toy("Sqa"), 1]
    assert plain.loss_mask.sum() == 4


def test_tail_is_kept_or_counted() -> None:
    records = [{"text": "abc"}, {"content": "d"}]
    kept, dropped = encoder(20), encoder(20, keep_tail=False)
    assert len(list(kept.samples(records))) == 1
    assert list(dropped.samples(records)) == []
    assert dropped.report.dropped_tokens == 6
    assert "6 tokens in all were dropped" in str(dropped.report)
    assert kept.finish() == []


def test_cleaning_is_an_option() -> None:
    text = "\uff11\u00a0\uff0c\uff01\uff21\u202f"
    assert clean_text(text) == "1 ,!\uff21 "
    sample = next(encoder(9, clean=True).samples([{"text": text}]))
    assert sample.input_ids[:7].tolist() == [*toy(clean_text(text)), 1]


BAD_RECORDS = {
    "no text": ({"body": "a"}, "needs 'text' or 'content', or 'prompt' and 'answer'"),
    "nothing": ({}, "this one has: nothing"),
    "text of another type": ({"text": 3}, "field 'text' of a record holds a int"),
    "prompt of another type": ({"prompt": None, "answer": "a"}, "field 'prompt' of a record holds a NoneType"),
    "unknown role": ({"chat_rounds": [{"role": "robot", "content": "a"}]}, "did you mean 'bot'"),
    "round without content": ({"chat_rounds": [{"role": "bot"}]}, "'role' and 'content'"),
    "rounds of another type": ({"chat_rounds": 3}, "'role' and 'content'"),
    "list": (["text"], "has to be an object"),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_bad_record_gets_one_clear_message(case: str) -> None:
    record, message = BAD_RECORDS[case]
    with pytest.raises(DataError, match=message):
        encoder(9).add(record)  # type: ignore[arg-type]


def test_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'concat'"):
        encoder(9, padding="concatenate")
    with pytest.raises(ConfigError, match="mode='chat'"):
        encoder(9, mode="chat")
    with pytest.raises(ConfigError, match="window=1"):
        encoder(1)
