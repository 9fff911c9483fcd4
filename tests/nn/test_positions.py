"""RoPE frequencies against transformers' own, relative-position property, and purity in the length."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from farspan.errors import ConfigError
from farspan.nn.positions import apply_rotary, rope_frequencies, rotary_table

TURNS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 5e5, "factor": 16.0, "beta_fast": 16.0, "beta_slow": 2.0},
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.0},
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "attention_factor": 1.5, "truncate": False},
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, **TURNS},
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, **TURNS, "original_max_position_embeddings": 32},
    ],
)
@pytest.mark.parametrize("length", [100, 256, 1000])
def test_frequencies_equal_those_of_transformers(parameters: dict, length: int) -> None:
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=256, rope_parameters=dict(parameters)
    )
    config.rope_parameters.setdefault("original_max_position_embeddings", 256)
    theirs, scaling = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"), seq_len=length)
    ours, our_scaling = rope_frequencies(32, parameters, 256, length)
    torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-5)
    assert our_scaling == pytest.approx(scaling)


def test_scores_depend_on_distance_alone() -> None:
    frequencies, _ = rope_frequencies(16, {}, 2048, 2048)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(query: int, key: int) -> torch.Tensor:
        turned = [
            apply_rotary(x, *rotary_table(torch.tensor([[place]]), frequencies)) for x, place in ((q, query), (k, key))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(7, 3), score(1007, 1003), atol=1e-4, rtol=1e-4)


def test_partial_rotation_leaves_the_rest_alone() -> None:
    frequencies, _ = rope_frequencies(4, {}, 64, 64)
    x = torch.randn(1, 3, 2, 10)
    turned = apply_rotary(x, *rotary_table(torch.arange(3)[None], frequencies))
    assert torch.equal(turned[..., 4:], x[..., 4:])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_angles_stay_float32_in_16_bit_models() -> None:
    frequencies, _ = rope_frequencies(8, {}, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cos, _ = rotary_table(torch.tensor([[256, 257]]), frequencies)
    assert cos.dtype == torch.float32
    assert not torch.equal(cos[0, 0], cos[0, 1])


def test_dynamic_needs_more_than_one_pair() -> None:
    with pytest.raises(ConfigError, match="at least 4 rotary channels"):
        rope_frequencies(2, {"rope_type": "dynamic", "factor": 2.0}, 16, 32)


def test_interleaved_pairs_are_the_half_split_pairs_of_permuted_channels() -> None:
    x, places = torch.randn(1, 5, 2, 12), torch.arange(5)[None]
    table = rotary_table(places, rope_frequencies(8, {}, 64, 64)[0])
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7, 8, 9, 10, 11])
    turned = apply_rotary(x, *table, interleaved=True)
    torch.testing.assert_close(turned[..., order], apply_rotary(x[..., order], *table))
    complex_pairs = torch.view_as_complex(x[..., :8].unflatten(-1, (4, 2)).contiguous())
    want = torch.view_as_real(complex_pairs * torch.complex(*table).unsqueeze(2)).flatten(-2)
    torch.testing.assert_close(turned[..., :8], want)
