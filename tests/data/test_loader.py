"""The training source: what a batch holds, which order it comes in, and going on exactly where it was."""

import copy
import pickle
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farspan.data.dataset import PreparedDataset, open_dataset
from farspan.data.loader import PackedWindows, make_loader
from farspan.errors import CheckpointError, ConfigError, DataError

Batch = dict[str, torch.Tensor]


def source(dataset: PreparedDataset, **options: Any) -> PackedWindows:
    return PackedWindows(dataset.split("train"), **{"sequence_length": 32, "batch_size": 3, **options})


def take(batches: Any, count: int) -> list[Batch]:
    return list(islice(iter(batches), count))


def equal(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("separate_documents", [True, False])
@pytest.mark.parametrize("length", [1, 5, 32, 200])
def test_batch_equals_a_walk_over_the_tokens(dataset: PreparedDataset, length: int, separate_documents: bool) -> None:
    windows = source(dataset, sequence_length=length, separate_documents=separate_documents)
    tokens, end = windows.split.data.tokens.tolist(), dataset.metadata.end_of_document
    for step in range(20):
        batch = windows.batch(3 * step)
        inputs, labels, positions, starts = [], [], [], []
        for sample in range(3 * step, 3 * step + 3):
            first = windows.window_start(sample)
            for place in range(first, first + length):
                fresh = place == first or (separate_documents and tokens[place] == end)
                starts += [len(inputs)] if fresh else []
                positions.append(0 if fresh else positions[-1] + 1)
                inputs.append(tokens[place])
                labels.append(tokens[place + 1])
        assert batch["input_ids"].tolist() == [inputs]
        assert batch["labels"].tolist() == [labels]
        assert batch["position_ids"].tolist() == [positions]
        assert batch["cu_seqlens"].tolist() == [*starts, len(inputs)]
        assert [batch[name].dtype for name in ("input_ids", "labels", "position_ids")] == [torch.int64] * 3
        assert batch["cu_seqlens"].dtype == torch.int32


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order(dataset: PreparedDataset) -> None:
    windows = source(dataset)
    count = windows.samples_per_epoch
    epochs = [[windows.window_start(epoch * count + index) for index in range(count)] for epoch in range(2)]
    for starts in epochs:
        gaps = np.diff(sorted(starts))
        assert (gaps == 32).all()
        assert min(starts) >= 0 and max(starts) + 33 <= len(windows.split.data.tokens)
    assert [start // 32 for start in epochs[0]] != [start // 32 for start in epochs[1]]
    assert sorted(epochs[0]) != epochs[0]


def test_over_epochs_every_token_is_seen(dataset: PreparedDataset) -> None:
    tokens = len(dataset.split("train").data.tokens)
    length = next(length for length in range(20, 100) if 1 <= (tokens - 1) % length <= 3)
    windows = source(dataset, sequence_length=length)
    seen = np.zeros(tokens, dtype=bool)
    for sample in range(20 * windows.samples_per_epoch):
        start = windows.window_start(sample)
        seen[start : start + length + 1] = True
    assert seen.all()


@given(st.integers(0, 30), st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_ranks_together_take_what_one_process_takes(
    dataset: PreparedDataset, step: int, per_rank: int, ranks: int, separate_documents: bool
) -> None:
    def rows(rank: int, world_size: int, batch_size: int) -> list[list[int]]:
        options: dict[str, Any] = {"batch_size": batch_size, "rank": rank, "world_size": world_size}
        windows = source(dataset, separate_documents=separate_documents, **options)
        batch = windows.batch(step * per_rank * ranks)
        return torch.cat([batch["input_ids"], batch["labels"]]).view(2, batch_size, 32).transpose(0, 1).tolist()

    alone = rows(0, 1, per_rank * ranks)
    shared: list[Any] = [None] * (per_rank * ranks)
    for rank in range(ranks):
        shared[rank::ranks] = rows(rank, ranks, per_rank)
    assert shared == alone


@pytest.mark.parametrize("taken", [0, 1, 7, 40])
def test_a_restored_loader_gives_the_exact_next_batches(dataset: PreparedDataset, taken: int) -> None:
    def loader() -> Any:
        return make_loader(dataset, sequence_length=32, batch_size=3, seed=5)

    whole = take(loader(), taken + 4)
    first = loader()
    batches = iter(first)
    assert equal([next(batches) for _ in range(taken)], whole[:taken])
    state = pickle.loads(pickle.dumps(first.state_dict()))

    second = loader()
    second.load_state_dict(state)
    batches = iter(second)
    resumed = [next(batches)]
    state = copy.deepcopy(second.state_dict())  # and once more, after one batch
    third = loader()
    third.load_state_dict(state)
    assert equal(resumed + take(third, 3), whole[taken:])


def test_a_position_can_be_resumed_by_another_number_of_ranks(dataset: PreparedDataset) -> None:
    alone = source(dataset, batch_size=4)
    batches = iter(alone)
    for _ in range(5):
        next(batches)
    expected = [alone.window_start(sample) for sample in range(20, 28)]
    found: list[Any] = [None] * 8
    for rank in range(2):
        windows = source(dataset, batch_size=2, rank=rank, world_size=2)
        windows.load_state_dict(alone.state_dict())
        rows = torch.cat([batch["input_ids"].view(2, 32) for batch in take(windows, 2)])
        found[rank::2] = rows.tolist()
    tokens = alone.split.data.tokens
    assert found == [tokens[start : start + 32].tolist() for start in expected]


@pytest.mark.parametrize("taken", [0, 3, 4])
def test_worker_processes_give_the_same_batches_and_resume(dataset: PreparedDataset, taken: int) -> None:
    whole = take(source(dataset), taken + 5)

    def loader() -> Any:
        return make_loader(dataset, sequence_length=32, batch_size=3, num_workers=2)

    first = loader()
    batches = iter(first)
    assert equal([next(batches) for _ in range(taken)], whole[:taken])
    state = first.state_dict()
    del batches
    second = loader()
    second.load_state_dict(state)
    assert equal(take(second, 5), whole[taken:])


@pytest.mark.parametrize(("changed", "value"), [("sequence_length", 16), ("seed", 1), ("tokens", None)])
def test_a_position_of_another_run_is_refused(dataset: PreparedDataset, changed: str, value: int | None) -> None:
    state = source(dataset).state_dict()
    if value is None:
        other = PackedWindows(dataset.split("valid"), sequence_length=32, batch_size=3)
    else:
        other = source(dataset, **{changed: value})
    with pytest.raises(CheckpointError, match=f"has {changed}="):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sequence_length": 0}, ConfigError, "sequence_length=0"),
        ({"batch_size": 0}, ConfigError, "batch_size=0"),
        ({"rank": 2, "world_size": 2}, ConfigError, "rank=2 is not accepted"),
        ({"rank": -1}, ConfigError, "rank=-1 is not accepted"),
        ({"sequence_length": 10**6}, DataError, "fewer than one window"),
    ],
)
def test_bad_options_are_refused(
    dataset: PreparedDataset, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        source(dataset, **options)


def test_a_token_outside_the_vocabulary_is_named_with_its_place(dataset: PreparedDataset, tmp_path: Path) -> None:
    damaged = open_dataset(shutil.copytree(dataset.directory, tmp_path / "damaged"))
    tokens = np.memmap(tmp_path / "damaged" / "train.bin", dtype=np.uint16, mode="r+")
    tokens[100] = 258
    loader = make_loader(damaged, "train", sequence_length=len(tokens) - 1, batch_size=1)
    with pytest.raises(DataError, match=r"train\.bin is damaged: token 100 is 258, and the vocabulary has 258 entries"):
        next(iter(loader))
    with pytest.raises(DataError, match=r"train\.bin is damaged: token 100 is 258"):
        list(damaged.documents("train"))
