"""The cosine layer: positions, the count in its cache, both directions, and its published names."""

from typing import Any

import pytest
import torch
from torch import Tensor

from farspan import FarspanConfig
from farspan.errors import CheckpointError, ConfigError
from farspan.mixers import SequenceLayout
from farspan.mixers.base import MIXERS
from farspan.mixers.cosine import CosineMixer, CosineOptions
from farspan.models.convert.cottention import (
    bert_attention_entries,
    bert_self_attention_entries,
    gpt_attention_entries,
)
from farspan.models.convert.names import to_ours, to_published
from farspan.models.modeling import FarspanModel
from farspan.ops import varlen
from farspan.training.optimizer import decay_groups
from tests import tolerances
from tests.models.conftest import tiny
from tests.ops.checks import assert_close, boundaries

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "gpt": {"partial_rotary_factor": 0.5, "rope_interleaved": True},
    "bert": {"attention_bias": True, "rope": False},
    "query": {"norm_position": "query"},
}


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


def make(causal: bool = True, **options: Any) -> CosineMixer:
    config = FarspanConfig(vocab_size=1, hidden_size=16, num_attention_heads=2, mixers=["cosine"], causal=causal)
    mixer = CosineMixer(config, CosineOptions(**options), 0).double()
    torch.nn.init.normal_(mixer.length_exponent)
    return mixer


def run(
    mixer: CosineMixer, x: Tensor, mask: Tensor | None = None, bounds: Tensor | None = None, cache: Any = None
) -> Tensor:
    """Positions count real tokens and continue behind the cache."""
    positions = torch.arange(x.shape[1]).expand(x.shape[0], -1)
    if mask is not None:
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    if bounds is not None:
        positions = varlen.position_ids(bounds).unsqueeze(0)
    if cache is not None and cache.get("count") is not None:
        positions = positions + cache.get("count").unsqueeze(1)
    return mixer(x, layout=SequenceLayout(positions, mask, bounds), cache=cache).detach()


def test_defaults_are_the_released_values() -> None:
    mixer = CosineMixer(FarspanConfig(hidden_size=16, num_attention_heads=2, mixers=["cosine"]), CosineOptions(), 0)
    assert mixer.length_exponent.tolist() == [0.5, 0.5]
    assert (mixer.options.norm_eps, mixer.options.norm_position) == (1e-12, "value")
    assert mixer.q_proj.bias is None


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_prefill_in_two_parts_then_steps(options: dict[str, Any], cut: int) -> None:
    mixer, x = make(**options), torch.randn(2, 12, 16, dtype=torch.float64)
    full, cache = run(mixer, x), make().new_cache()
    pieces = [run(mixer, piece, cache=cache) for piece in (x[:, :cut], *x[:, cut:].split(1, dim=1))]
    assert_close(torch.cat(pieces, dim=1), full, tolerances.FLOAT64)
    assert cache.get("count").tolist() == [12, 12]


def test_the_count_of_a_padded_row_is_its_real_tokens() -> None:
    mixer, x = make(), torch.randn(3, 6, 16, dtype=torch.float64)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0] * 6]).bool()
    cache, token = mixer.new_cache(), torch.randn(3, 1, 16, dtype=torch.float64)
    run(mixer, x, mask, cache=cache)
    assert cache.get("count").tolist() == [4, 3, 0]
    step = run(mixer, token, cache=cache)
    for row in range(3):
        alone = torch.cat((x[row : row + 1, mask[row]], token[row : row + 1]), dim=1)
        assert_close(step[row : row + 1], run(mixer, alone)[:, -1:], tolerances.FLOAT64)


def test_reordering_the_cache_moves_state_and_count() -> None:
    mixer, x = make(), torch.randn(2, 5, 16, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    cache, token, order = mixer.new_cache(), torch.randn(3, 1, 16, dtype=torch.float64), torch.tensor([1, 0, 1])
    run(mixer, x, mask, cache=cache)
    cache.select(order)
    assert cache.get("count").tolist() == [2, 5, 2]
    out = run(mixer, token, cache=cache)
    again = mixer.new_cache()
    run(mixer, x[order], mask[order], cache=again)
    assert_close(out, run(mixer, token, cache=again), tolerances.FLOAT64)


def test_the_cache_is_constant_and_as_large_as_stated() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        mixer, sizes = make().to(dtype), set()
        cache = mixer.new_cache()
        for _ in range(20):
            run(mixer, torch.randn(1, 3, 16, dtype=dtype), cache=cache)
            sizes.add(cache.nbytes())
        assert sizes == {mixer.state_bytes(60, dtype)}
        assert cache.get("recurrent").dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_shift_of_all_positions_changes_nothing(interleaved: bool) -> None:
    mixer, x = make(rope_interleaved=interleaved), torch.randn(1, 9, 16, dtype=torch.float64)
    positions = torch.arange(9).unsqueeze(0)
    out = mixer(x, layout=SequenceLayout(positions))
    shifted = mixer(x, layout=SequenceLayout(positions + 7))
    assert_close(shifted, out, tolerances.FLOAT32)  # angles are float32
    moved = mixer(x, layout=SequenceLayout(2 * positions))
    assert (moved - out).abs().max() > 1e-3


@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_equal_separate_ones(options: dict[str, Any], causal: bool) -> None:
    mixer, bounds = make(causal, **options), boundaries([7, 0, 30, 1])
    x = torch.randn(1, 38, 16, dtype=torch.float64)
    packed = run(mixer, x, bounds=bounds)
    for start, end in ((0, 7), (7, 37), (37, 38)):
        assert_close(packed[:, start:end], run(mixer, x[:, start:end]), tolerances.FLOAT64)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("row", ["0000011111", "1111100000", "0011011101"])
def test_padding_anywhere_changes_nothing(options: dict[str, Any], causal: bool, row: str) -> None:
    mixer, x = make(causal, **options), torch.randn(2, 10, 16, dtype=torch.float64)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1] = torch.tensor([c == "1" for c in row])
    out = run(mixer, x, mask)
    assert_close(out[1:, mask[1]], run(mixer, x[1:, mask[1]]), tolerances.FLOAT64)
    assert_close(out[:1], run(mixer, x[:1]), tolerances.FLOAT64)
    bias = torch.zeros(16, dtype=torch.float64) if mixer.o_proj.bias is None else mixer.o_proj.bias
    assert torch.equal(out[~mask], bias.detach().expand_as(out[~mask]))  # the context of padding is exactly 0


def test_bidirectional_sees_both_sides_and_without_positions_no_order() -> None:
    mixer, x, order = make(False, rope=False), torch.randn(1, 9, 16, dtype=torch.float64), torch.randperm(9)
    assert_close(run(mixer, x[:, order]), run(mixer, x)[:, order], tolerances.FLOAT64)
    for changed in (0, 4, 8):
        other = x.clone()
        other[:, changed] += 1.0
        assert ((run(mixer, other) - run(mixer, x)).abs().amax(-1) > 1e-6).all()


def test_an_encoder_reads_padded_and_packed_batches() -> None:
    config = FarspanConfig(
        vocab_size=31, hidden_size=16, num_attention_heads=2, mixers=["cosine", "metala"], causal=False
    )
    model, ids = FarspanModel(config).eval(), torch.randint(1, 31, (2, 9))
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    with torch.no_grad():
        padded = model(ids, attention_mask=mask).last_hidden_state
        packed = model(
            torch.cat((ids[:1], ids[1:, :5]), dim=1), cu_seqlens=torch.tensor([0, 9, 14], dtype=torch.int32)
        ).last_hidden_state
    assert_close(packed[:, :9], padded[:1], tolerances.FLOAT32)
    assert_close(packed[:, 9:], padded[1:, :5], tolerances.FLOAT32)


def test_operations_are_counted() -> None:
    projections = 2.0 * 4 * 16 * 16
    assert make().flops_per_token(100) == projections + 4 * 2 * 8 * 8
    assert make(False, rope=False).flops_per_token(100) == projections + 4 * 2 * 8 * 8
    assert make(False, rope=False).flops_per_token(3) == projections + 4 * 2 * 8 * 3


def test_the_exponent_is_not_decayed() -> None:
    model = tiny("cosine")
    decayed = {id(p) for p in decay_groups(model, 0.1)[0]["params"]}
    exponents = [p for name, p in model.named_parameters() if name.endswith("length_exponent")]
    assert len(exponents) == 3 and not decayed & {id(p) for p in exponents}


@pytest.mark.parametrize(
    ("entries", "bias"),
    [(gpt_attention_entries(2), False), (bert_attention_entries(2), True)],
    ids=["gpt", "bert"],
)
def test_published_names_round_trip(entries: list, bias: bool) -> None:
    ours = make(attention_bias=bias).state_dict()
    published = to_published(ours, entries)
    assert published[next(name for name in published if "norm_const" in name)].shape == (1, 2, 1, 1)
    again = to_ours(published, entries)
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], ours[name]) for name in ours)


def test_a_checkpoint_of_the_other_attention_is_refused() -> None:
    published = to_published(make().state_dict(), gpt_attention_entries(2))
    published.pop("norm_const")
    with pytest.raises(CheckpointError, match=r"missing \['norm_const'\]"):
        to_ours(published, gpt_attention_entries(2))
    config = FarspanConfig(hidden_size=16, num_attention_heads=2, mixers=["softmax"])
    softmax = MIXERS.get("softmax")[0](config, MIXERS.build_options("softmax", {}), 0)
    with pytest.raises(RuntimeError, match="length_exponent"):
        softmax.load_state_dict(make().state_dict())
    assert {entry.ours for entry in bert_self_attention_entries(2)} < make(attention_bias=True).state_dict().keys()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"partial_rotary_factor": 0.0}, r"partial_rotary_factor=0.0 must lie in \(0, 1\]"),
        ({"partial_rotary_factor": 0.4}, "3 of head_dim=8 would be rotated"),
        ({"norm_position": "vlaue"}, "did you mean 'value'"),
        ({"norm_eps": 0.0}, "norm_eps=0.0 must be positive"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(**options)
