"""Names and settings of stock language models of transformers: LLaMA, Qwen3 and GPT-NeoX, as `softmax` mixers."""

from farspan.models.convert.families import Family

FAMILIES: tuple[Family, ...] = ()
