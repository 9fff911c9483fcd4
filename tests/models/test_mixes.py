"""Any mix of all mechanisms in one stack: it trains, saves, loads and decodes as it computes."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farspan import FarspanConfig, FarspanForCausalLM

SEVEN = ("collinear", "cosine", "dilated", "dynamic_mask", "metala", "softmax", "ssd")
FEED_FORWARDS = ("cdmoe", "gated_mlp", "mlp", "peer", "seimoe")


def _model(mixers: list[str], feed_forwards: list[str] | None = None) -> FarspanForCausalLM:
    torch.manual_seed(0)
    options = {
        "dilated": {"segment_lengths": [8, 16], "dilations": [1, 2]},
        "dynamic_mask": {"keep_window_size": 8},
        "cdmoe": {"num_experts": 16, "num_experts_per_tok": 4},
        "peer": {"num_experts": 16, "num_experts_per_tok": 4},
        "seimoe": {"num_experts": 4, "num_experts_per_tok": 2},
    }
    feed_forwards = feed_forwards or ["gated_mlp"]
    return FarspanForCausalLM(
        FarspanConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            mixers=mixers,
            feed_forwards=feed_forwards,
            mixer_options={name: options[name] for name in set(mixers) & options.keys()},
            feed_forward_options={name: options[name] for name in set(feed_forwards) & options.keys()},
        )
    )


def _decodes_as_it_computes(model: FarspanForCausalLM) -> None:
    model.eval()
    ids = torch.randint(1, 32, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    greedy = {"attention_mask": mask, "max_new_tokens": 14, "do_sample": False, "pad_token_id": 0}
    assert model.generate(ids, **greedy).tolist() == model.generate(ids, use_cache=False, **greedy).tolist()


@pytest.mark.parametrize("start", range(7))
def test_a_permutation_of_all_seven_trains_saves_loads_and_generates(start: int, tmp_path: Path) -> None:
    order = torch.randperm(7, generator=torch.Generator().manual_seed(start)).tolist()
    model = _model([SEVEN[i] for i in order]).train()
    ids = torch.arange(32).repeat(2, 2)[:, :24]
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model(ids, labels=ids, output_logits=False).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval().save_pretrained(tmp_path)
    again = FarspanForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    _decodes_as_it_computes(again)


def test_every_parameter_of_all_seven_has_a_gradient() -> None:
    model = _model(list(SEVEN)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.5)
    ids = torch.randint(0, 32, (2, 24))
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@settings(max_examples=15)
@given(
    mixers=st.lists(st.sampled_from(SEVEN), min_size=1, max_size=4),
    feed_forward=st.sampled_from(FEED_FORWARDS),
)
def test_random_mixes_decode_as_they_compute(mixers: list[str], feed_forward: str) -> None:
    _decodes_as_it_computes(_model(mixers, [feed_forward]))
