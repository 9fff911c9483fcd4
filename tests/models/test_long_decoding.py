"""A thousand tokens after a prompt of four thousand: memory stays at its bound, logits are the full forward's."""

import pytest
import torch

from farspan import FarspanConfig, FarspanForCausalLM

PROMPT, STEPS = 4000, 1000
BOUNDED = {
    "dynamic_mask": {"keep_window_size": 256},
    "dilated": {"segment_lengths": [512, 1024, 2048], "dilations": [1, 2, 4]},
    "cosine": {},
    "metala": {},
    "ssd": {},
}


def _decode(mixer: str, options: dict) -> tuple[list[int], float]:
    """Bytes of the cache after the prompt and after each hundred steps, and the largest error of the logits."""
    torch.manual_seed(0)
    config = FarspanConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        mixers=[mixer],
        mixer_options={mixer: options},
        initializer_range=0.2,
    )
    model = FarspanForCausalLM(config).eval()
    ids = torch.randint(0, 32, (1, PROMPT + STEPS))
    with torch.no_grad():
        full = model(ids, use_cache=False).logits[:, PROMPT:]
        cache = model.new_cache()
        model(ids[:, :PROMPT], past_key_values=cache, logits_to_keep=1)
        sizes, worst = [cache.nbytes()], 0.0
        for t in range(STEPS):
            step = model(ids[:, PROMPT + t : PROMPT + t + 1], past_key_values=cache).logits
            worst = max(worst, float((step[:, 0] - full[:, t]).abs().max()))
            if (t + 1) % 100 == 0:
                sizes.append(cache.nbytes())
    return sizes, worst


@pytest.mark.parametrize("mixer", sorted(BOUNDED))
def test_bounded_memory_stays_at_its_bound(mixer: str) -> None:
    sizes, worst = _decode(mixer, BOUNDED[mixer])
    assert worst <= 1e-4
    assert max(sizes) == sizes[0], sizes


def test_collinear_keeps_three_quarters_of_what_softmax_keeps() -> None:
    collinear, worst = _decode("collinear", {})
    assert worst <= 1e-4
    softmax, worst = _decode("softmax", {})
    assert worst <= 1e-4
    assert collinear[-1] <= 0.76 * softmax[-1]
