"""The bidirectional MetaLA layer: both sides are seen, alike, document by document."""

from typing import Any

import pytest
import torch
from torch import Tensor

from farspan import FarspanConfig
from farspan.errors import ConfigError
from farspan.mixers import SequenceLayout
from farspan.mixers.metala import MetaLAMixer, MetaLAOptions
from farspan.models.modeling import FarspanModel
from farspan.ops import varlen
from tests import tolerances
from tests.ops.checks import assert_close, boundaries

OPTIONS = {"released": {}, "plain": {"conv_size": None, "self_augmentation": False}, "own_key": {"use_key": True}}


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS)
def mixer(request: pytest.FixtureRequest) -> MetaLAMixer:
    return make(causal=False, **request.param)


def make(causal: bool, **options: Any) -> MetaLAMixer:
    config = FarspanConfig(vocab_size=1, hidden_size=16, num_attention_heads=2, mixers=["metala"], causal=causal)
    mixer = MetaLAMixer(config, MetaLAOptions(**options), 0).double()
    if mixer.augmentation is not None:
        torch.nn.init.normal_(mixer.augmentation)
    return mixer


def run(mixer: MetaLAMixer, x: Tensor, mask: Tensor | None = None, bounds: Tensor | None = None) -> Tensor:
    positions = torch.arange(x.shape[1]).expand(x.shape[0], -1)
    return mixer(x, layout=SequenceLayout(positions, mask, bounds)).detach()


def test_reversing_the_sequence_reverses_the_output(mixer: MetaLAMixer) -> None:
    x = torch.randn(2, 45, 16, dtype=torch.float64)
    assert_close(run(mixer, x.flip(1)).flip(1), run(mixer, x), tolerances.FLOAT64)


def test_every_token_sees_the_past_and_the_future(mixer: MetaLAMixer) -> None:
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    for changed in range(9):
        other = x.clone()
        other[:, changed] += 1.0
        moved = (run(mixer, other) - run(mixer, x)).abs().amax(-1)
        assert (moved > 1e-8).all(), f"token {changed} does not reach {(moved <= 1e-8).nonzero().tolist()}"


def test_both_directions_share_the_causal_parameters() -> None:
    """Without the convolution the layer before its gate is the sum of the causal one and its mirror image."""
    both, causal = make(False, conv_size=None), make(True, conv_size=None)
    causal.load_state_dict(both.state_dict())
    both.o_proj = causal.o_proj = torch.nn.Identity()
    x = torch.randn(1, 40, 16, dtype=torch.float64)
    gate = torch.nn.functional.silu(both.gate_proj(x)).detach()
    mirrored = run(causal, x.flip(1)).flip(1)
    assert_close(run(both, x) / gate, (run(causal, x) + mirrored) / gate, tolerances.FLOAT64)


@pytest.mark.parametrize("lengths", [[7, 0, 34], [1, 1, 12]])
def test_packed_documents_equal_separate_ones_both_ways(mixer: MetaLAMixer, lengths: list[int]) -> None:
    bounds, x = boundaries(lengths), torch.randn(1, sum(lengths), 16, dtype=torch.float64)
    packed = run(mixer, x, bounds=bounds)
    for start, end in varlen.spans(bounds):
        if end > start:
            assert_close(packed[:, start:end], run(mixer, x[:, start:end]), tolerances.FLOAT64)


@pytest.mark.parametrize("row", ["0000011111", "1111100000", "0011011101"])
def test_padding_anywhere_changes_nothing_both_ways(mixer: MetaLAMixer, row: str) -> None:
    x, mask = torch.randn(2, 10, 16, dtype=torch.float64), torch.ones(2, 10, dtype=torch.bool)
    mask[1] = torch.tensor([c == "1" for c in row])
    out = run(mixer, x, mask)
    assert_close(out[1:, mask[1]], run(mixer, x[1:, mask[1]]), tolerances.FLOAT64)
    assert_close(out[:1], run(mixer, x[:1]), tolerances.FLOAT64)


def test_operations_of_the_second_direction_are_counted() -> None:
    recurrence, convolution = 4.0 * 2 * 4 * 8, 2.0 * 16 * 4
    assert make(False).flops_per_token(64) - make(True).flops_per_token(64) == recurrence + convolution


def test_a_bidirectional_model_takes_no_cache() -> None:
    model = FarspanModel(
        FarspanConfig(vocab_size=8, hidden_size=16, num_attention_heads=2, mixers=["metala"], causal=False)
    )
    ids = torch.tensor([[1, 2, 3]])
    assert model.eval()(ids).past_key_values is None
    with pytest.raises(ConfigError, match="looks both ways has no past"):
        model(ids, past_key_values=model.new_cache())
