"""Cheems of Wonderful Matrices: seven layers of state space duality, then one of dynamic mask attention.

Source: LoserCheems/WonderfulMatrices: models/configuration_cheems.py (its defaults). The published initial values,
A = +1 and router keys of zero, are not these: with them the state grows exponentially and all experts tie.
"""

from typing import Any

from farspan.models.configuration import FarspanConfig
from farspan.models.presets.preset import Preset

_SOURCE = "LoserCheems/WonderfulMatrices, arXiv 2412.11834"


def _cheems(**fields: Any) -> FarspanConfig:
    attention = {"bias_heads": "query", "qk_norm": False, "select": "none", "bias_init": 1.0}
    return FarspanConfig(
        vocab_size=32768,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=32,
        num_attention_heads=8,
        mixers=[*["ssd"] * 7, "dynamic_mask"],
        # A is kept as the exponent itself, as in checkpoints, but starts where the state forgets.
        mixer_options={"dynamic_mask": attention, "ssd": {"log_decay": False, "skip": False, "dt_bias": False}},
        residual_scaling="per_channel",
        rope_parameters={"rope_type": "dynamic", "factor": 4.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **fields,
    )


def _moe() -> FarspanConfig:
    options = {
        "num_experts": 16129,
        "unreachable_experts": 219,
        "num_experts_per_tok": 8,
        "num_expert_heads": 4,
        "router": "query_key",
        "retrieval_size": 64,
        "router_aux_loss_coef": 0.0,
    }
    return _cheems(feed_forwards=["cdmoe"], feed_forward_options={"cdmoe": options})


PRESETS = {"cheems": Preset(_cheems, 369_493_248, _SOURCE), "cheems-moe": Preset(_moe, 1_450_304_768, _SOURCE)}
