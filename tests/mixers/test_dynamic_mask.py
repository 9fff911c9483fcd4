"""The dynamic-mask layer: its switches, and a cache that holds the live keys and nothing else."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from farspan import FarspanConfig
from farspan.errors import CheckpointError, ConfigError
from farspan.mixers import LayerCache, SequenceLayout
from farspan.mixers.dynamic_mask import DynamicMaskMixer, DynamicMaskOptions
from farspan.mixers.live_cache import BiasedKeyCache, LiveKeyCache
from farspan.mixers.softmax import SoftmaxMixer, SoftmaxOptions
from farspan.models.convert.doge import attention_entries, attention_options
from farspan.models.convert.names import to_ours, to_published
from farspan.ops.dynamic_mask.expiry import expiry
from tests import tolerances
from tests.ops.checks import assert_close

WIDTH = 24


def build(dtype: torch.dtype = torch.float64, causal: bool = True, **options: Any) -> DynamicMaskMixer:
    """4 query heads, 2 key heads, weights large enough for selections to matter."""
    config = FarspanConfig(
        vocab_size=8,
        hidden_size=WIDTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        mixers=["dynamic_mask"],
        causal=causal,
    )
    mixer = DynamicMaskMixer(config, DynamicMaskOptions(**{"keep_window_size": 5, **options}), layer_idx=0)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer.to(dtype)


def run(mixer: DynamicMaskMixer, x: Tensor, start: int = 0, cache: LayerCache | None = None, **more: Any) -> Tensor:
    positions = torch.arange(start, start + x.shape[1]).expand(x.shape[:2])
    return mixer(x, layout=SequenceLayout(positions, **more), cache=cache)


def tokens(batch: int, length: int, distinct: int = 7) -> Tensor:
    """Inputs that repeat a few tokens, as a first layer sees them: most biases are tied."""
    vocabulary = torch.randn(distinct, WIDTH, dtype=torch.float64)
    return vocabulary[torch.randint(distinct, (batch, length))]


VARIANTS = {
    "kv": {},
    "query": {"bias_heads": "query", "bias_form": "linear", "qk_norm": False},
    "one": {"keep_window_size": 1},
    "window": {"sliding_window": 8, "keep_window_size": 3},
    "relu": {"select": "relu", "bias_form": "linear"},
    "none": {"select": "none"},
    "unbiased": {"bias_form": "none", "rope": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunks", [(1,) * 40, (30, 1, 1, 1, 1, 1, 5), (3, 20, 1, 16), (40,), (1, 39)])
@torch.no_grad()
def test_cache_equals_the_whole_sequence(variant: str, chunks: tuple[int, ...]) -> None:
    mixer, x = build(**VARIANTS[variant]), tokens(2, 40)
    whole, cache, place, parts = run(mixer, x), mixer.new_cache(), 0, []
    for piece in x.split(chunks, dim=1):
        parts.append(run(mixer, piece, place, cache))
        place += piece.shape[1]
    assert_close(torch.cat(parts, dim=1), whole, tolerances.FLOAT64)


@given(
    steps=st.lists(st.sampled_from([1, 1, 1, 2, 7, 13]), min_size=1, max_size=8),
    keep=st.integers(1, 9),
    query_heads=st.booleans(),
    padded=st.booleans(),
)
@torch.no_grad()
def test_cache_with_padding_at_any_place(steps: list[int], keep: int, query_heads: bool, padded: bool) -> None:
    mixer = build(keep_window_size=keep, bias_heads="query" if query_heads else "kv")
    x = tokens(2, sum(steps))
    mask = torch.rand(2, sum(steps)) > (0.4 if padded else -1.0)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = mixer(x, layout=SequenceLayout(positions, mask))
    cache, parts = mixer.new_cache(), []
    for part, where, real in zip(*(y.split(steps, dim=1) for y in (x, positions, mask)), strict=True):
        parts.append(mixer(part, layout=SequenceLayout(where, real), cache=cache))
    assert_close(torch.cat(parts, dim=1)[mask], whole[mask], tolerances.FLOAT64, largest=torch.ones(()))


@pytest.mark.parametrize("heads", ["kv", "query"])
@torch.no_grad()
def test_cache_holds_exactly_the_live_keys(heads: str) -> None:
    """w per bias head, those that the expiry of the whole text leaves; heads that share keys hold their union."""
    mixer, x, keep = build(bias_heads=heads), tokens(2, 30, distinct=30), 5
    ranking = mixer.key_ranking(x, mixer.key_bias(mixer.project(x, SequenceLayout(torch.arange(30).expand(2, -1)))[2]))
    cache = mixer.new_cache()
    assert isinstance(cache, LiveKeyCache)
    for t in range(30):
        run(mixer, x[:, t : t + 1], t, cache)
        alive = expiry(ranking[:, : t + 1], keep) > t
        assert (alive.sum(1) == min(t + 1, keep)).all()
        held = cache.tensors["rankings"][:, : cache.length] > float("-inf")
        born = cache.tensors["born"][:, : cache.length].long().unsqueeze(-1).expand(held.shape)
        for row, head in ((row, head) for row in range(2) for head in range(mixer.bias_heads)):
            group, member = divmod(head, mixer.bias_heads // 2)
            slots = held[row, :, group, member]
            assert set(born[row, :, group, member][slots].tolist()) == set(alive[row, :, head].nonzero()[:, 0].tolist())


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_cache_bytes_are_as_declared_and_bounded(variant: str) -> None:
    mixer, x = build(torch.float32, **VARIANTS[variant]), tokens(1, 40).float()
    for length in (1, 4, 12, 40):
        cache = mixer.new_cache()
        run(mixer, x[:, :length], 0, cache)
        assert cache.nbytes() == mixer.state_bytes(length, torch.float32)
    sizes = []
    cache = mixer.new_cache()
    for t in range(40):
        run(mixer, x[:, t : t + 1], t, cache)
        sizes.append(cache.nbytes())
    if mixer.cache_kind(mixer.options) == "window":
        bound = mixer.state_bytes(1 << 40, torch.float32)
        assert max(sizes[12:]) <= (bound if mixer.options.evicts else 2 * bound) and len(set(sizes[20:])) == 1
    else:
        assert sizes[-1] >= mixer.state_bytes(40, torch.float32) > sizes[10]


@torch.no_grad()
def test_cache_follows_its_rows() -> None:
    mixer, x = build(bias_heads="query"), tokens(3, 20, distinct=40)
    cache = mixer.new_cache()
    run(mixer, x[:, :15], 0, cache)
    order = torch.tensor([2, 2, 0])
    cache.select(order)
    out = run(mixer, x[order, 15:16], 15, cache)
    assert_close(out, run(mixer, x[:, :16])[order, 15:], tolerances.FLOAT64)
    cache.reset()
    assert cache.nbytes() == 0
    assert_close(run(mixer, x, 0, cache), run(mixer, x), tolerances.FLOAT64)
    with pytest.raises(ConfigError, match="cannot take back 1 tokens"):
        cache.crop(1)


@pytest.mark.parametrize("heads", ["kv", "query"])
@pytest.mark.parametrize("prompt", [2, 17])
@torch.no_grad()
def test_a_pinned_cache_stays_in_one_place(prompt: int, heads: str) -> None:
    """Room for some steps or all slots; then text of any length goes on, and room can be made again."""
    mixer, x = build(bias_heads=heads), tokens(2, 40)
    cache = mixer.new_cache()
    outs = [run(mixer, x[:, :prompt], 0, cache)]
    for start in (prompt, prompt + 3):
        cache.pin(3)
        places = {name: tensor.data_ptr() for name, tensor in cache.tensors.items()}
        outs += [run(mixer, x[:, t : t + 1], t, cache) for t in range(start, start + 3)]
        assert {name: tensor.data_ptr() for name, tensor in cache.tensors.items()} == places
    outs.append(run(mixer, x[:, prompt + 6 :], prompt + 6, cache))
    assert_close(torch.cat(outs, dim=1), run(mixer, x), tolerances.FLOAT64)


@torch.no_grad()
def test_a_prompt_is_not_kept_alive_nor_written_to() -> None:
    mixer, x = build(torch.float32, keep_window_size=50), tokens(1, 10).float()
    keys = mixer.project(x, SequenceLayout(torch.arange(10)[None]))[1]
    before, cache = keys.clone(), LiveKeyCache(50, 1)
    bias = torch.zeros(1, 10, 2)
    cache.append(keys, keys, bias, bias, None)
    run(mixer, x[:, :1], 10, cache)
    assert torch.equal(keys, before)
    assert cache.tensors["keys"].untyped_storage().data_ptr() != keys.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"select": "topk_global"}, "select='topk_global'"), ({"smoothing_block": 4}, "smoothing_block=4")],
)
@torch.no_grad()
def test_selections_that_look_ahead_refuse_to_continue(options: dict, words: str) -> None:
    mixer, x = build(**options), tokens(1, 12)
    cache = mixer.new_cache()
    assert_close(run(mixer, x, 0, cache), run(mixer, x), 0.0)
    assert cache.nbytes() == mixer.state_bytes(12, torch.float64) == 0
    with pytest.raises(ConfigError, match=f"{words} looks at the future.*use_cache=False"):
        run(mixer, x[:, :1], 12, cache)
    cache.reset()
    run(mixer, x, 0, cache)
    assert mixer.cache_kind(mixer.options) == "window"


@torch.no_grad()
def test_the_last_query_of_a_global_selection_is_the_causal_one() -> None:
    """What decoding with `topk_causal` computes is what a global selection of all tokens so far would."""
    outs = []
    for select in ("topk_global", "topk_causal"):
        torch.manual_seed(3)
        outs.append(run(build(select=select), tokens(2, 20))[:, -1])
    assert_close(outs[0], outs[1], tolerances.FLOAT64)


@torch.no_grad()
def test_equal_tokens_rank_equal_in_calls_of_any_shape() -> None:
    for dtype in (torch.float32, torch.float64):
        mixer = build(dtype, attention_bias=True)
        x = tokens(1, 61, distinct=5).to(dtype)
        layout = SequenceLayout(torch.arange(61)[None])
        whole = mixer.key_ranking(x, mixer.key_bias(mixer.project(x, layout)[2]))
        for t in range(0, 61, 7):
            one = x[:, t : t + 1]
            alone = mixer.key_ranking(one, mixer.key_bias(mixer.project(one, SequenceLayout(torch.tensor([[t]])))[2]))
            assert torch.equal(alone, whole[:, t : t + 1])
        bias = mixer.key_bias(mixer.project(x, layout)[2])
        assert_close(bias.log(), whole.to(bias.dtype), tolerances.FLOAT32)


@torch.no_grad()
def test_ranking_follows_a_projection_that_is_more_than_linear() -> None:
    class Adapted(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x[..., : self.out_features]

    mixer = build()
    mixer.v_proj = Adapted(WIDTH, 12, bias=False).double()
    x = tokens(1, 9)
    bias = mixer.key_bias(mixer.v_proj(x).unflatten(-1, (2, 6)))
    assert torch.equal(mixer.key_ranking(x, bias), bias)


def test_new_layers_are_plain_attention_whose_scale_moves_first() -> None:
    mixer = build(qk_norm=False, keep_window_size=100)
    mixer.reset_parameters()
    plain = SoftmaxMixer(
        FarspanConfig(vocab_size=8, hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=2, head_dim=6),
        SoftmaxOptions(),
        layer_idx=0,
    ).double()
    plain.load_state_dict({name: x for name, x in mixer.state_dict().items() if not name.startswith("bias_")})
    x = torch.randn(2, 30, WIDTH, dtype=torch.float64)
    out = run(mixer, x)
    assert_close(out, plain(x, layout=SequenceLayout(torch.arange(30).expand(2, -1))), tolerances.FLOAT64)
    out.square().sum().backward()
    assert (mixer.bias_proj.weight.grad == 0).all() and (mixer.bias_scale.grad != 0).all()


@pytest.mark.parametrize("window", [None, 4])
def test_padded_rows_attend_by_option(window: int | None) -> None:
    """As its definition; a window counts places, and a row without any key weighs all values alike."""
    mixer, x = (
        build(padding_attends=True, sliding_window=window, keep_window_size=2),
        torch.randn(2, 11, WIDTH).double(),
    )
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, :3] = mask[0, 8:] = mask[1, 2:8] = False
    q, k, v = mixer.project(x, SequenceLayout(torch.arange(11).expand(2, -1)))
    bias, out = mixer.key_bias(v), torch.empty(2, 11, 4, 6, dtype=torch.float64)
    for row, i, head in itertools.product(range(2), range(11), range(4)):
        keys, group = [j for j in range(max(0, i + 1 - (window or 11)), i + 1) if mask[row, j]], head // 2
        best = [keys[n] for n in bias[row, keys, group].argsort()[-2:]]
        scores = q[row, i, head] @ k[row, best, group].T * 6**-0.5 + bias[row, best, group]
        out[row, i, head] = scores.softmax(0) @ v[row, best, group] if keys else v[row, :, group].mean(0)
    x.requires_grad_()
    ours = run(mixer, x, padding_mask=mask)
    assert_close(ours, mixer.o_proj(out.flatten(2)), tolerances.FLOAT64)
    ours.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in (x, *mixer.parameters()))
    if window is None:
        mixer.options = dataclasses.replace(mixer.options, padding_attends=False)
        assert_close(run(mixer, x, padding_mask=mask)[mask], ours[mask], tolerances.FLOAT64)


def test_padded_rows_attend_in_causal_models_alone() -> None:
    with pytest.raises(ConfigError, match="padding_attends=true is a form of causal models"):
        build(causal=False, padding_attends=True)


@pytest.mark.parametrize("select", ["none", "relu", "topk_causal", "topk_global"])
def test_looking_both_ways_selects_among_all_keys(select: str) -> None:
    mixer = build(causal=False, select=select, bias_form="linear")
    x = torch.randn(2, 20, WIDTH, dtype=torch.float64)  # no ties, which the order of the tokens would decide
    out = run(mixer, x)
    order = torch.randperm(20)
    positions = order.expand(2, -1)
    moved = mixer(x[:, order], layout=SequenceLayout(positions))
    assert_close(moved, out[:, order], tolerances.FLOAT64)
    if select == "topk_causal":
        mixer.options.select = "topk_global"
        assert_close(run(mixer, x), out, tolerances.FLOAT64)


@pytest.mark.parametrize("options", [{}, {"bias_heads": "query"}, {"bias_form": "linear"}, {"attention_bias": True}])
def test_every_parameter_has_a_gradient(options: dict) -> None:
    mixer, x = build(**options), torch.randn(2, 30, WIDTH, dtype=torch.float64, requires_grad=True)
    run(mixer, x).square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_large_biases_stay_finite() -> None:
    for form in ("exp", "linear"):
        mixer = build(torch.float32, bias_form=form)
        torch.nn.init.constant_(mixer.bias_scale, 1e3)
        x = torch.randn(1, 30, WIDTH, requires_grad=True)
        out = run(mixer, x)
        out.square().sum().backward()
        assert out.isfinite().all() and x.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in mixer.parameters())


@torch.no_grad()
def test_bfloat16_is_close_to_float32() -> None:
    mixer = build(torch.float32, keep_window_size=100)
    x = torch.randn(1, 40, WIDTH).bfloat16().float()
    low = build(torch.bfloat16, keep_window_size=100)
    low.load_state_dict(mixer.state_dict())
    mixer.load_state_dict(low.state_dict())
    # Weights, values and output are rounded, and the bias is formed from rounded values.
    assert_close(run(low, x.bfloat16()).float(), run(mixer, x), 2 * tolerances.BFLOAT16)


def test_operations_are_counted() -> None:
    length = 64
    mixer, x = build(torch.float32, select="none"), torch.randn(1, length, WIDTH)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(mixer, x)
    full = mixer.flops_per_token(length) * length
    attention = 4.0 * 4 * 6 * length * (length + 1) / 2
    # The counter sees every score, the definition's count the causal half; the ranking is not of the model.
    assert full - attention == pytest.approx(counter.get_total_flops() - 4 * 4 * 6 * length**2)
    narrow = build(torch.float32, keep_window_size=8)
    saved = 4.0 * 4 * 6 * ((length + 1) / 2 - (36 + 56 * 8) / length)
    assert mixer.flops_per_token(length) - narrow.flops_per_token(length) == pytest.approx(saved)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bias_form": "log"}, "Unknown bias_form 'log'"),
        ({"bias_heads": "all"}, "Accepted: kv, query"),
        ({"select": "topk"}, "did you mean 'topk_"),
        ({"keep_window_size": 0}, "keep_window_size=0 must be at least 1"),
        ({"sliding_window": 0}, "sliding_window=0 must be at least 1"),
        ({"smoothing_block": 0}, "smoothing_block=0 must be at least 1"),
        ({"smoothing_block": 4, "select": "none"}, "smooths a selection"),
        ({"smoothing_block": 4, "bias_form": "none"}, "smooths a selection"),
        ({"norm_eps": 0.0}, "norm_eps=0.0 must be positive"),
    ],
)
def test_bad_options(options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DynamicMaskOptions(**options)


def test_rope_needs_pairs() -> None:
    config = FarspanConfig(vocab_size=8, hidden_size=9, num_attention_heads=3, mixers=["dynamic_mask"])
    with pytest.raises(ConfigError, match="head_dim=3 is odd"):
        DynamicMaskMixer(config, DynamicMaskOptions(), layer_idx=0)


def test_cache_kinds() -> None:
    kinds = {name: build(**options).cache_kind(DynamicMaskOptions(**options)) for name, options in VARIANTS.items()}
    assert {name for name, kind in kinds.items() if kind == "window"} == {"kv", "query", "one", "window"}
    assert isinstance(build(select="relu").new_cache(), BiasedKeyCache)


@pytest.mark.parametrize("heads", ["kv", "query"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_published_names_both_ways(heads: str, norm: bool, bias: bool) -> None:
    mixer = build(bias_heads=heads, qk_norm=norm, attention_bias=bias)
    entries = attention_entries(bias=bias, qk_norm=norm)
    published = to_published(mixer.state_dict(), entries)
    assert {"A", "dt_proj.weight"} <= set(published) and ("q_norm.weight" in published) == norm
    shapes = {name: tuple(x.shape) for name, x in published.items()}
    assert attention_options(shapes, 6) == {"attention_bias": bias, "qk_norm": norm, "bias_heads": heads}
    back = to_ours(published, entries)
    assert all(torch.equal(back[name], x) for name, x in mixer.state_dict().items())
    with pytest.raises(CheckpointError, match="norm"):
        to_ours(published, attention_entries(bias=bias, qk_norm=not norm))
