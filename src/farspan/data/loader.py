"""The training source: packed batches whose order depends on one global counter, and on nothing else.

The tokens of a split, documents back to back, are cut into windows of ``sequence_length + 1`` tokens that share one
token with their neighbours, so every token but the first is a label once per epoch. Sample i of the run is window
``permutation_epoch(i mod S)`` of epoch ``i div S``, S windows per epoch. Rank d of D takes the samples ``i·D + d``.
The state is the number of samples all ranks have taken; so a run stops and goes on at any batch, with another number
of ranks if need be, and reading a position costs O(1).
"""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from farspan.data.dataset import PreparedDataset, Split
from farspan.data.permutation import Permutation
from farspan.errors import CheckpointError, ConfigError, DataError


class PackedWindows(IterableDataset[dict[str, torch.Tensor]]):
    """An endless stream of packed batches from one split.

    A batch lays `batch_size` windows end to end, N = batch_size · sequence_length positions in all:

    ================  ==============  ==================================================================================
    `input_ids`       int64 `[1, N]`  tokens
    `labels`          int64 `[1, N]`  what each position has to predict (already shifted)
    `position_ids`    int64 `[1, N]`  restarts at 0 where a sequence starts
    `cu_seqlens`      int32 `[n+1]`   where the sequences start, then N
    ================  ==============  ==================================================================================

    A sequence starts at the start of each window and, with `separate_documents`, at each end-of-document token that is
    read: the token that a document ends with starts the next one, from an empty memory. So no label is left out, no
    memory crosses a document, and the model learns how documents begin, which is how they are scored and generated.

    The last ``(tokens - 1) mod sequence_length`` tokens do not fill a window; each epoch shifts its windows by a seeded
    number of tokens within that slack, so that all of the split is seen.

    Args:
        split: the split to read.
        sequence_length: positions per window.
        batch_size: windows per batch and rank.
        seed: order of the samples.
        rank: number of this process among those that share the work.
        world_size: number of those processes.
        separate_documents: whether sequences end where documents end.

    Raises:
        ConfigError: for sizes or ranks that make no sense.
        DataError: when the split is shorter than one window.
    """

    def __init__(
        self,
        split: Split,
        *,
        sequence_length: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        separate_documents: bool = True,
    ) -> None:
        for name, value in (("sequence_length", sequence_length), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigError(f"{name}={value} is not accepted; it has to be at least 1.")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank} is not accepted; ranks are 0 to world_size - 1 = {world_size - 1}.")
        self.split = split
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.separate_documents = separate_documents
        labels = len(split.data.tokens) - 1
        self.samples_per_epoch = labels // sequence_length
        self._slack = labels % sequence_length
        if self.samples_per_epoch < 1:
            raise DataError(
                f"the {split.name} split has {labels + 1} tokens, fewer than one window of sequence_length + 1 = "
                f"{sequence_length + 1}. Use a shorter sequence_length or more data."
            )
        self._samples = 0
        self._epoch: tuple[int, Permutation, int] | None = None

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        step = self.batch_size * self.world_size
        while True:
            first = self._samples + number * step
            self._samples += workers * step
            yield self.batch(first)

    def state_dict(self) -> dict[str, Any]:
        """The position: samples taken by all ranks together, and what that number means."""
        return {"samples": self._samples, **self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position.

        Raises:
            CheckpointError: when the position was saved for other data, another sequence length or another seed.
        """
        for name, value in self._order().items():
            if state.get(name) != value:
                raise CheckpointError(
                    f"the saved data position has {name}={state.get(name)}, this run has {value}: the order of samples "
                    "would differ. Resume with the same data and settings, or start a new run."
                )
        self._samples = state["samples"]

    def _order(self) -> dict[str, Any]:
        return {"tokens": len(self.split.data.tokens), "sequence_length": self.sequence_length, "seed": self.seed}

    def batch(self, first: int) -> dict[str, torch.Tensor]:
        """This rank's batch of the global samples ``first .. first + batch_size · world_size - 1``.

        Raises:
            DataError: when it holds a token that is not in the vocabulary.
        """
        length = self.sequence_length
        samples = range(first + self.rank, first + self.batch_size * self.world_size, self.world_size)
        starts = [self.window_start(sample) for sample in samples]
        tokens = np.stack([self.split.read(start, start + length + 1) for start in starts])
        restarts = [np.arange(len(starts)) * length]
        if self.separate_documents:
            ends = self.split.starts[1:] - 1
            for row, start in enumerate(starts):
                low, high = np.searchsorted(ends, (start, start + length))
                restarts.append(ends[low:high] - start + row * length)
        positions = len(starts) * length
        cu_seqlens = np.append(np.unique(np.concatenate(restarts)), positions)
        position_ids = np.arange(positions) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
        return {
            "input_ids": torch.from_numpy(tokens[:, :-1].reshape(1, -1)),
            "labels": torch.from_numpy(tokens[:, 1:].reshape(1, -1)),
            "position_ids": torch.from_numpy(position_ids[None]),
            "cu_seqlens": torch.from_numpy(cu_seqlens.astype(np.int32)),
        }

    def window_start(self, sample: int) -> int:
        """Where in the split's tokens the window of a global sample starts."""
        epoch, index = divmod(sample, self.samples_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            shift = int(np.random.default_rng((self.seed, epoch, 1)).integers(self._slack + 1))
            self._epoch = epoch, Permutation(self.samples_per_epoch, (self.seed, epoch)), shift
        _, permutation, shift = self._epoch
        return int(permutation(np.array([index]))[0]) * self.sequence_length + shift


def make_loader(
    dataset: PreparedDataset,
    split: str = "train",
    *,
    sequence_length: int,
    batch_size: int,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    separate_documents: bool = True,
    num_workers: int = 0,
) -> StatefulDataLoader:
    """An endless loader over a split; ``state_dict`` and ``load_state_dict`` give the exact next batch.

    Args:
        dataset: the prepared dataset.
        split: name of the split.
        sequence_length: positions per window.
        batch_size: windows per batch and rank; a batch is one packed row of ``batch_size · sequence_length`` positions.
        seed: order of the samples.
        rank: number of this process among those that share the work.
        world_size: number of those processes; a saved position can be resumed with another number.
        separate_documents: whether sequences end where documents end; see `PackedWindows`.
        num_workers: processes that read ahead. Reading is a memory map, so 0 is rarely the bottleneck. A saved
            position is resumed with the same number.
    """
    source = PackedWindows(
        dataset.split(split),
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        separate_documents=separate_documents,
    )
    with warnings.catch_warnings():
        # torchdata 0.11 calls a function that torch 2.13 declares deprecated.
        warnings.filterwarnings("ignore", "'set_vital' is deprecated", UserWarning)
        return StatefulDataLoader(source, batch_size=None, num_workers=num_workers)
