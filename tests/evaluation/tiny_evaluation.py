"""Tiny models and documents for the tests of evaluation."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from farspan.models import FarspanConfig, FarspanForCausalLM

EOD = 0
VOCABULARY = 40


@dataclass(frozen=True)
class Text:
    """A document as the dataset gives it: the last token ends it."""

    tokens: np.ndarray
    bytes: int


def tiny_model(*mixers: str, **config: Any) -> FarspanForCausalLM:
    """An untrained model with weights large enough that every position and every token of context matters."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    values = {"mixers": list(mixers), "initializer_range": 0.3, "eos_token_id": EOD, **sizes, **config}
    return FarspanForCausalLM(FarspanConfig(**values)).eval()


def texts(*sizes: int) -> list[Text]:
    """Documents of so many tokens (their end not counted), 3 bytes per token."""
    generator = np.random.default_rng(1)
    tokens = [np.append(generator.integers(1, VOCABULARY, size), EOD) for size in sizes]
    return [Text(ids, 3 * (len(ids) - 1)) for ids in tokens]
