"""The sample order of GPT-NeoX: which tokens of a token file make up sample i of a run.

Farspan trains from `loader`; this is for reproducing runs of GPT-NeoX and of CoCA on the same files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from farspan.data.indexed import IndexedDataset
from farspan.errors import ConfigError, DataError


@dataclass(frozen=True)
class IndexMaps:
    """The three arrays that order the samples.

    Args:
        documents: int32 `[E · items]`, the items in shuffled order, each E times (E epochs).
        samples: `[S + 1, 2]`, where in that stream each sample starts: (position in `documents`, token offset).
        shuffle: uint32 `[S]`, the order in which the samples are visited.
        epochs: E.
    """

    documents: np.ndarray
    samples: np.ndarray
    shuffle: np.ndarray
    epochs: int

    def __len__(self) -> int:
        return len(self.shuffle)

    def read(self, dataset: IndexedDataset, index: int) -> np.ndarray:
        """The ``sequence_length + 1`` tokens of the sample visited as number `index`."""
        row = int(self.shuffle[index])
        (first, start), (last, end) = self.samples[row].tolist(), self.samples[row + 1].tolist()
        if first == last:
            return dataset.get(int(self.documents[first]), start, end - start + 1)
        middle = [dataset[int(item)] for item in self.documents[first + 1 : last]]
        head, tail = dataset.get(int(self.documents[first]), start), dataset.get(int(self.documents[last]), 0, end + 1)
        return np.concatenate([head, *middle, tail])


def build_index_maps(
    sizes: np.ndarray, items: Sequence[int] | np.ndarray, *, sequence_length: int, num_samples: int, seed: int
) -> IndexMaps:
    """Lays the items end to end, E times over in one random order, and cuts samples that share one token.

    With T the tokens of one epoch, E is the smallest number for which S = (E·T − 1) div sequence_length is at least
    `num_samples`; S samples are made. Sample s starts at token s · sequence_length of the stream.

    Args:
        sizes: `[N]`, tokens of each item of the file (`IndexedDataset.sizes`).
        items: the items that belong to the split.
        sequence_length: tokens per sample, less the one that is only a label.
        num_samples: least number of samples.
        seed: of numpy's legacy generator, which shuffles first the items, then the samples.

    Raises:
        ConfigError: when `sequence_length` or `num_samples` is below 1.
        DataError: when the items hold no token.

    Note:
        The published dataset reports S − 1 as its length and so never shows its last sample; here `len` is S.

    Source: codefuse-ai/Collinear-Constrained-Attention: data/gpt2_dataset.py.
    """
    if sequence_length < 1 or num_samples < 1:
        raise ConfigError(f"sequence_length={sequence_length} and num_samples={num_samples} have to be at least 1.")
    items = np.asarray(items, dtype=np.int32)
    tokens = int(sizes[items].sum(dtype=np.int64))
    if not tokens:
        raise DataError("the items hold no token; there is nothing to make samples of.")
    epochs = -(-(num_samples * sequence_length + 1) // tokens)
    generator = np.random.RandomState(seed)
    documents = np.tile(items, epochs)
    generator.shuffle(documents)

    count = (epochs * tokens - 1) // sequence_length
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[documents], dtype=np.int64)])
    places = np.arange(count + 1, dtype=np.int64) * sequence_length
    rows = np.searchsorted(starts, places, side="right") - 1
    samples = np.stack([rows, places - starts[rows]], axis=1)
    if samples.max() <= np.iinfo(np.int32).max:
        samples = samples.astype(np.int32)

    shuffle = np.arange(count, dtype=np.uint32 if count < np.iinfo(np.uint32).max - 1 else np.int64)
    generator.shuffle(shuffle)
    return IndexMaps(documents, samples, shuffle, epochs)
