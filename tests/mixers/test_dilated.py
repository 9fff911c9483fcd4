"""The `dilated` mixer: decoding from live keys, its options, its bookkeeping, and `DilatedAttention` by itself."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from farspan import DilatedAttention, FarspanConfig, FarspanForCausalLM
from farspan.errors import ConfigError, ShapeError
from farspan.mixers import SequenceLayout
from farspan.mixers.dilated import DilatedCache, DilatedMixer, DilatedOptions
from farspan.models.convert.longnet import attention_entries
from farspan.models.convert.names import to_ours, to_published
from farspan.ops.dilated.patterns import ceil_div
from tests.ops.checks import assert_close
from tests.tolerances import BFLOAT16, FLOAT32, FLOAT64

POSITIONS = ["none", "rope", "xpos", "alibi", "relative_bias", "xpos+relative_bias", "rope+alibi"]
TINY = {"segment_lengths": [3, 8, 10], "dilations": [1, 2, 3], "xpos_scale_base": 16.0}


def _mixer(groups: int = 4, causal: bool = True, heads: int = 4, **options: Any) -> DilatedMixer:
    config = FarspanConfig(
        vocab_size=8,
        hidden_size=8 * heads,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        mixers=["dilated"],
        causal=causal,
    )
    mixer = DilatedMixer(config, DilatedOptions(**{**TINY, **options}), 0).double().eval()
    if mixer.relative_bias is not None:
        torch.nn.init.normal_(mixer.relative_bias)
    return mixer


def _layout(x: Tensor, past: int = 0, mask: Tensor | None = None) -> SequenceLayout:
    steps = torch.arange(x.shape[1]).expand(x.shape[0], -1) if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    return SequenceLayout(past + steps, mask)


def _decode(mixer: DilatedMixer, x: Tensor, chunks: list[int]) -> tuple[Tensor, DilatedCache]:
    cache, past, outs = mixer.new_cache(), 0, []
    with torch.no_grad():
        for piece in x.split(chunks, dim=1):
            outs.append(mixer(piece, layout=_layout(piece, past), cache=cache))
            past += piece.shape[1]
    assert isinstance(cache, DilatedCache)
    return torch.cat(outs, dim=1), cache


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("chunks", [[1] * 25, [12] + [1] * 13, [1, 24], [7, 9, 9], [25]])
def test_decoding_equals_the_full_forward(positions: str, chunks: list[int]) -> None:
    mixer, x = _mixer(positions=positions), torch.randn(2, 25, 32, dtype=torch.float64)
    with torch.no_grad():
        full = mixer(x, layout=_layout(x))
    assert_close(_decode(mixer, x, chunks)[0], full, FLOAT64)


@given(
    patterns=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 5)), min_size=1, max_size=3),
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    rule=st.sampled_from(["mod", "block", "none"]),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1), (3, 1), (6, 2)]),
)
def test_decoding_in_any_chunks_of_any_patterns(
    patterns: list, chunks: list[int], rule: str, heads: tuple[int, int]
) -> None:
    mixer = _mixer(
        heads=heads[0],
        groups=heads[1],
        segment_lengths=[w for w, _ in patterns],
        dilations=[r for _, r in patterns],
        head_offset=rule,
        positions="xpos+alibi",
    )
    x = torch.randn(2, sum(chunks), 8 * heads[0], dtype=torch.float64)
    with torch.no_grad():
        full = mixer(x, layout=_layout(x))
    assert_close(_decode(mixer, x, chunks)[0], full, FLOAT64, largest=torch.ones(()))


@pytest.mark.parametrize("chunks", [[1] * 29, [11] + [1] * 18, [7, 13, 9]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_xpos_that_turns_ahead_is_the_same(
    dtype: torch.dtype, chunks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Growth of e^42 on either side: products of keys and queries of two segments leave float32.
    mixer = _mixer(positions="xpos", segment_lengths=[3, 6, 12], xpos_scale_base=0.177).to(dtype)
    x = 4 * torch.randn(2, 29, 32, dtype=dtype)
    assert mixer._turns_ahead(dtype) and not mixer._turns_ahead(torch.float16)
    with torch.no_grad():
        full, limit = mixer(x, layout=_layout(x)), FLOAT64 if dtype == torch.float64 else FLOAT32
    assert_close(_decode(mixer, x, chunks)[0], full, limit)
    assert _decode(mixer, 3000 * x, chunks)[0].isfinite().all()
    monkeypatch.setattr(mixer, "_turns_ahead", lambda _: False)
    with torch.no_grad():
        assert_close(full, mixer(x, layout=_layout(x)), limit)


@pytest.mark.parametrize("first", [torch.float16, torch.float32], ids=str)
def test_xpos_goes_on_as_it_began_where_autocast_comes_or_goes(first: torch.dtype) -> None:
    mixer = _mixer(positions="xpos", segment_lengths=[3, 6, 12], xpos_scale_base=0.177).float()
    x, cache, outs = torch.randn(2, 29, 32), mixer.new_cache(), []
    with torch.no_grad():
        for start, end in ((0, 7), (7, 20), (20, 21)):
            with torch.autocast("cpu", torch.float16, enabled=(first == torch.float16) == (start == 0)):
                piece = x[:, start:end]
                outs.append(mixer(piece, layout=_layout(piece, start), cache=cache).float())
        assert_close(torch.cat(outs, dim=1), mixer(x[:, :21], layout=_layout(x[:, :21])), BFLOAT16)


def test_long_chunks_behind_a_past_are_read_in_blocks() -> None:
    mixer, x = _mixer(segment_lengths=[16, 300], dilations=[1, 7]), torch.randn(1, 400, 32, dtype=torch.float64)
    with torch.no_grad():
        full = mixer(x, layout=_layout(x))
    assert_close(_decode(mixer, x, [30, 370])[0], full, FLOAT64)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("positions", POSITIONS)
def test_padding_changes_nothing(causal: bool, positions: str) -> None:
    mixer, x = _mixer(causal=causal, positions=positions), torch.randn(2, 14, 32, dtype=torch.float64)
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[0, [0, 5, 12, 13]] = False
    with torch.no_grad():
        padded = mixer(x, layout=_layout(x, mask=mask))
        for row in range(2):
            real = x[row : row + 1, mask[row]]
            assert_close(padded[row : row + 1, mask[row]], mixer(real, layout=_layout(real)), FLOAT64)


def test_padding_inside_cached_chunks_changes_nothing() -> None:
    mixer, x = _mixer(positions="xpos"), torch.randn(2, 20, 32, dtype=torch.float64)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, [0, 1, 9, 13, 19]] = False
    cache, outs = mixer.new_cache(), []
    with torch.no_grad():
        for piece, kept in zip(x.split([6, 8, 1, 5], dim=1), mask.split([6, 8, 1, 5], dim=1), strict=True):
            outs.append(mixer(piece, layout=_layout(piece, mask=kept), cache=cache))
        got = torch.cat(outs, dim=1)
        assert got.isfinite().all()
        for row in range(2):
            real = x[row : row + 1, mask[row]]
            assert_close(got[row : row + 1, mask[row]], mixer(real, layout=_layout(real)), FLOAT64)


def test_live_keys_stay_below_their_bound() -> None:
    mixer, x = _mixer(), torch.randn(1, 60, 32, dtype=torch.float64)
    sizes, cache = [], mixer.new_cache()
    with torch.no_grad():
        for t in range(60):
            mixer(x[:, t : t + 1], layout=_layout(x[:, t : t + 1], t), cache=cache)
            sizes.append(cache.nbytes())
    assert len(set(sizes[12:])) == 1
    bound = sum(ceil_div(w, r) for w, r in zip(TINY["segment_lengths"], TINY["dilations"], strict=True))
    assert cache.tensors["keys0"].shape[2] == 4
    rows = sum(x.shape[1] - 1 for name, x in cache.tensors.items() if name.startswith("keys"))
    assert rows == bound  # and one spare row per pattern


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 5, 30])
def test_state_bytes_are_what_is_allocated(groups: int, length: int) -> None:
    mixer, x = _mixer(groups=groups), torch.randn(1, length, 32, dtype=torch.float64)
    _, cache = _decode(mixer, x, [length])
    assert cache.nbytes() == mixer.state_bytes(length, torch.float64)


@pytest.mark.parametrize("causal", [True, False])
def test_flops_are_what_is_counted(causal: bool) -> None:
    """Scores and values of each visible pair, and the projections."""
    mixer, length = _mixer(causal=causal), 23
    pairs = 0
    for w, r in zip(mixer.options.segment_lengths, mixer.options.dilations, strict=True):
        for head in range(4):
            rows = [p for p in range(length) if p % w % r == head % r]
            pairs += sum(q // w == k // w and (k <= q or not causal) for q in rows for k in rows)
    assert mixer.flops_per_token(length) == pytest.approx(2 * 4 * 32 * 32 + 4 * 8 * pairs / length)


def test_beam_reorder_and_reset() -> None:
    mixer, x = _mixer(positions="rope"), torch.randn(2, 12, 32, dtype=torch.float64)
    _, cache = _decode(mixer, x, [11, 1])
    cache.select(torch.tensor([1, 1, 0]))
    more = torch.randn(1, 1, 32, dtype=torch.float64).expand(3, -1, -1)
    with torch.no_grad():
        step = mixer(more, layout=_layout(more, 12), cache=cache)
        for row, origin in enumerate((1, 1, 0)):
            whole = torch.cat((x[origin : origin + 1], more[:1]), dim=1)
            assert_close(step[row, -1], mixer(whole, layout=_layout(whole))[0, -1], FLOAT64)
    cache.reset()
    assert cache.nbytes() == 0 and cache.length == 0
    with pytest.raises(ConfigError, match="cannot take back"):
        cache.crop(1)


def test_zero_keys_decode_where_they_change_nothing_and_refuse_elsewhere() -> None:
    x = torch.randn(1, 20, 32, dtype=torch.float64)
    even = _mixer(segment_lengths=[4, 8], dilations=[1, 2], pad_mode="zero_keys")
    with torch.no_grad():
        assert_close(_decode(even, x, [9, 1, 10])[0], even(x, layout=_layout(x)), FLOAT64)
    with pytest.raises(ConfigError, match="use_cache=False"):
        _decode(_mixer(pad_mode="zero_keys"), x, [19, 1])


def test_a_million_tokens_behind_xpos_stays_exact() -> None:
    mixer, x = _mixer(positions="xpos", segment_lengths=[8], dilations=[1]), torch.randn(1, 8, 32, dtype=torch.float64)
    cache = mixer.new_cache()
    with torch.no_grad():
        mixer(x, layout=_layout(x), cache=cache)
        cache.tensors["seen"] += 8 * 125_000 - 8  # whole segments: what was read is dead
        step = mixer(x, layout=_layout(x, 10**6), cache=cache)
        assert_close(step, mixer(x, layout=_layout(x)), FLOAT64)


def test_sub_norm_qk_norm_and_dropout_act() -> None:
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    mixer = _mixer(qk_norm="layer_norm", sub_norm=True, attention_dropout=0.5)
    scaled = _mixer(qk_norm="layer_norm", sub_norm=True, attention_dropout=0.5)
    scaled.load_state_dict(mixer.state_dict())
    with torch.no_grad():
        scaled.q_proj.weight.mul_(3)
        scaled.v_proj.weight.mul_(5)
        assert_close(scaled(x, layout=_layout(x)), mixer(x, layout=_layout(x)), 1e-3)
        assert torch.equal(mixer(x, layout=_layout(x)), mixer(x, layout=_layout(x)))
        mixer.train()
        assert not torch.equal(mixer(x, layout=_layout(x)), mixer(x, layout=_layout(x)))


@pytest.mark.parametrize("sub_norm", [True, False])
def test_published_names_both_ways(sub_norm: bool) -> None:
    mixer = _mixer(attention_bias=True, sub_norm=sub_norm, positions="xpos")
    entries = attention_entries(8, xpos=True, sub_norm=sub_norm)
    published = to_published(mixer.state_dict(), entries)
    assert "xpos.scale" in published and "out_proj.bias" in published
    back = to_ours(published, entries)
    assert back.keys() == mixer.state_dict().keys()
    assert all(torch.equal(x, back[name]) for name, x in mixer.state_dict().items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"segment_lengths": [4, 8], "dilations": [1]}, "equally long"),
        ({"head_offset": "bloc"}, "block"),
        ({"pad_mode": "zero_key"}, "zero_keys"),
        ({"positions": "xpo"}, "xpos"),
        ({"positions": "rope+xpos"}, "at most one"),
        ({"positions": "none+alibi"}, "Unknown positions 'none'"),
        ({"qk_norm": "rmsnorm"}, "rms_norm"),
        ({"attention_dropout": 1.0}, "attention_dropout"),
        ({"xpos_scale_base": 0.0}, "xpos_scale_base"),
        ({"relative_bias_buckets": 2}, "relative_bias_buckets"),
    ],
)
def test_bad_options(options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FarspanConfig(mixers=["dilated"], mixer_options={"dilated": options})


def test_xpos_beyond_its_range_is_refused() -> None:
    mixer = _mixer(segment_lengths=[1100], dilations=[64], positions="xpos").float()
    x = torch.randn(1, 1100, 32)
    with pytest.raises(ConfigError, match="xpos_scale_base=16; use at least 17"):
        mixer(x, layout=_layout(x))


def test_model_decodes_beyond_every_segment() -> None:
    config = FarspanConfig(
        vocab_size=31,
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        mixers=["dilated"],
        mixer_options={"dilated": TINY},
    )
    model, ids = FarspanForCausalLM(config).eval(), torch.randint(0, 31, (1, 17))
    out = [model.generate(ids, max_new_tokens=24, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*out)


@pytest.mark.parametrize("length", [1, 7, 16, 30])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "flags", [{}, {"use_xpos": True}, {"use_rel_pos_bias": True}, {"use_xpos": True, "use_alibi": True}]
)
def test_dilated_attention_keeps_the_shape_of_any_input(length: int, causal: bool, flags: dict) -> None:
    layer = DilatedAttention(32, 4, 2, 8, dropout=0.1, causal=causal, **flags).eval()
    x = torch.randn(2, length, 32, requires_grad=True)
    out = layer(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    if causal:
        other = x.detach().clone()
        other[:, length // 2 :] = 1.0
        assert torch.equal(layer(other)[:, : length // 2], out[:, : length // 2])


def test_dilated_attention_is_the_mixer() -> None:
    layer = DilatedAttention(32, 4, [1, 2], [4, 8], use_rel_pos_bias=True, causal=True)
    mixer = _mixer(segment_lengths=[4, 8], dilations=[1, 2], positions="relative_bias", attention_bias=True).float()
    mixer.load_state_dict(layer.mixer.state_dict())
    x = torch.randn(2, 11, 32)
    assert torch.equal(layer(x), mixer(x, layout=_layout(x)))
    mask = torch.ones(2, 11)
    mask[:, :4] = 0
    torch.testing.assert_close(layer(x, mask)[:, 4:], layer(x[:, 4:]))


def test_dilated_attention_with_uncovered_tokens_gives_the_bias() -> None:
    layer = DilatedAttention(8, 1, 4, 8)
    assert torch.equal(layer(torch.randn(1, 8, 8))[0, 1], layer.mixer.o_proj.bias)


def test_dilated_attention_refuses_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="d_model=30 is not divisible by num_heads=4"):
        DilatedAttention(30, 4, 1, 8)
    with pytest.raises(ConfigError, match="equally long"):
        DilatedAttention(32, 4, [1, 2], 8)
    with pytest.raises(TypeError, match="casual"):
        DilatedAttention(32, 4, 1, 8, casual=True)
    with pytest.raises(ShapeError, match=r"expected \[B, T, D=32\]"):
        DilatedAttention(32, 4, 1, 8)(torch.randn(4, 16))
