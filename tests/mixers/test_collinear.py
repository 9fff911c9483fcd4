"""The collinear mixer: its cache, its positions, its names in the published checkpoints."""

import pytest
import torch
from torch import Tensor

from farspan import FarspanConfig
from farspan.errors import CheckpointError, ConfigError
from farspan.mixers import SequenceLayout
from farspan.mixers.collinear import CoefficientCache, CollinearMixer, CollinearOptions
from farspan.mixers.softmax import SoftmaxMixer, SoftmaxOptions
from farspan.models.convert.coca import llama_attention_entries, neox_attention_entries
from farspan.models.convert.names import to_ours, to_published
from farspan.ops import collinear_coefficients
from farspan.ops.collinear.reference import collinear_key, collinear_query
from farspan.ops.softmax.api import softmax_attention
from tests import tolerances
from tests.models.conftest import tiny
from tests.ops.checks import assert_close

VARIANTS = {
    "slack": {},
    "strict": {"form": "strict", "partial_rotary_factor": 0.5},
    "head": {"tie": "head", "partial_rotary_factor": 0.25, "attention_bias": True},
    "window": {"sliding_window": 4},
}


def make(causal: bool = True, config: dict | None = None, **options: object) -> CollinearMixer:
    fields = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "mixers": ["collinear"]}
    shape = FarspanConfig(vocab_size=1, causal=causal, **{**fields, **(config or {})})
    return CollinearMixer(shape, CollinearOptions(**options), layer_idx=0).double()


def inputs(rows: int = 2, length: int = 14) -> tuple[Tensor, Tensor]:
    x = 2 * torch.randn(rows, length, 32, dtype=torch.float64)
    return x, torch.arange(length).expand(rows, -1)


def in_pieces(
    mixer: CollinearMixer, x: Tensor, positions: Tensor, mask: Tensor | None, sizes: tuple[int, ...]
) -> tuple:
    """Output of the pieces one after another, and the cache."""
    cache, outs = mixer.new_cache(), []
    masks = [None] * len(sizes) if mask is None else mask.split(sizes, dim=1)
    for piece, place, real in zip(x.split(sizes, dim=1), positions.split(sizes, dim=1), masks, strict=True):
        outs.append(mixer(piece, layout=SequenceLayout(place, real), cache=cache))
    return torch.cat(outs, dim=1), cache


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("sizes", [(1,) * 14, (9, 1, 4), (3, 3, 3, 5)])
@pytest.mark.parametrize("offset", [0, 7])
def test_pieces_equal_the_whole(options: dict, sizes: tuple[int, ...], offset: int) -> None:
    mixer, (x, positions) = make(**options), inputs()
    whole = mixer(x, layout=SequenceLayout(positions + offset))
    pieces, cache = in_pieces(mixer, x, positions + offset, None, sizes)
    assert_close(pieces, whole, tolerances.FLOAT64)
    assert "positions" not in cache.tensors


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("pad_position", [0, 1])
def test_pieces_equal_the_whole_with_padding_anywhere(options: dict, pad_position: int) -> None:
    mixer, (x, _) = make(**options), inputs()
    mask = torch.tensor([[0] * 5 + [1] * 9, [1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0, 1, 1]]).bool()
    positions = (mask.long().cumsum(-1) - 1).masked_fill(~mask, pad_position)
    whole = mixer(x, layout=SequenceLayout(positions, mask))
    for sizes in ((1,) * 14, (4, 6, 1, 3)):
        pieces, cache = in_pieces(mixer, x, positions, mask, sizes)
        assert_close(pieces[mask], whole[mask], tolerances.FLOAT64)
        assert "positions" not in cache.tensors
    for row in range(2):
        alone = mixer(x[row : row + 1, mask[row]], layout=SequenceLayout(positions[row : row + 1, mask[row]]))
        assert_close(whole[row : row + 1, mask[row]], alone, tolerances.FLOAT64)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("padded", [False, True])
def test_positions_that_jump_are_stored(options: dict, padded: bool) -> None:
    mixer, (x, _) = make(**options), inputs()
    positions = torch.tensor([[3, 4, 5, 6, 20, 21, 22, 23, 24, 2, 3, 100, 101, 102], [*range(8), *range(30, 36)]])
    mask = torch.rand(2, 14) < 0.7 if padded else None
    whole = mixer(x, layout=SequenceLayout(positions, mask))
    for sizes in ((1,) * 14, (4, 6, 1, 3), (10, 4)):
        pieces, cache = in_pieces(mixer, x, positions, mask, sizes)
        real = torch.ones(2, 14, dtype=torch.bool) if mask is None else mask
        assert_close(pieces[real], whole[real], tolerances.FLOAT64)
        assert cache.tensors["positions"].dtype == torch.int32


def test_shift_changes_only_the_slack_form() -> None:
    for form, moves in (("slack", True), ("strict", False)):
        mixer, (x, positions) = make(form=form), inputs()
        here, there = (mixer(x, layout=SequenceLayout(positions + shift)) for shift in (0, 100))
        assert ((here - there).abs().max() > 1e-3) == moves


def test_cache_of_coefficients_equals_a_cache_of_rotated_keys() -> None:
    """What the published code keeps, K numbers, follows from what is kept here, K/2 numbers and the place."""
    for options in VARIANTS.values():
        mixer, (x, positions) = make(**options), inputs()
        _, cache = in_pieces(mixer, x, positions, None, (9, 5))
        raw = mixer.t_proj(x).unflatten(-1, (2, 8))
        t = collinear_coefficients(raw, mixer.rotary_dim, tie=mixer.options.tie)
        cos, sin = SequenceLayout(positions).rotary(mixer.rotary_dim, mixer.rope_parameters, 2048)
        form, tie = mixer.options.form, mixer.options.tie
        keys = torch.cat(
            [
                collinear_key(t[:, i : i + 1], cos[:, i : i + 1], sin[:, i : i + 1], form=form, tie=tie)
                for i in range(14)
            ],
            dim=1,
        )
        query = collinear_query(mixer.q_proj(x).unflatten(-1, (4, 8)), cos, sin, form=form, scale=8**-0.5)
        out = softmax_attention(
            query, keys, mixer.v_proj(x).unflatten(-1, (2, 8)), scale=1.0, window=mixer.options.sliding_window
        )
        assert_close(in_pieces(mixer, x, positions, None, (9, 5))[0], mixer.o_proj(out.flatten(2)), tolerances.FLOAT64)
        kept = cache.tensors["keys"][:, : cache.length]
        assert_close(kept, t[:, -cache.length :], tolerances.FLOAT64)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_bidirectional_sees_both_sides(options: dict) -> None:
    mixer, (x, positions) = make(causal=False, **options), inputs(length=6)
    before = mixer(x, layout=SequenceLayout(positions))
    changed = x.clone()
    changed[:, 3] += 1
    after = mixer(changed, layout=SequenceLayout(positions))
    moved = (after - before).abs().amax(-1) > 1e-9
    assert moved[:, 2].all() and moved[:, 4].all()
    mask = torch.tensor([[1, 1, 0, 1, 1, 0], [1] * 6]).bool()
    places = (mask.long().cumsum(-1) - 1).clamp(min=0)
    padded = mixer(x, layout=SequenceLayout(places, mask))
    alone = mixer(x[:1, mask[0]], layout=SequenceLayout(places[:1, mask[0]]))
    assert_close(padded[:1, mask[0]], alone, tolerances.FLOAT64)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_gradients_reach_every_parameter_and_stay_in_the_past(options: dict) -> None:
    mixer, (x, positions) = make(**options), inputs()
    x.requires_grad_()
    mixer(x, layout=SequenceLayout(positions))[:, :9].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in mixer.parameters())
    assert (x.grad[:, 9:] == 0).all() and (x.grad[:, :9] != 0).any()


@pytest.mark.parametrize("form", ["slack", "strict"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_takes_three_quarters_of_softmax(form: str, dtype: torch.dtype) -> None:
    ours = tiny("collinear", mixer_options={"collinear": {"form": form}}).to(dtype)
    theirs = tiny("softmax").to(dtype)
    ids = torch.randint(1, 61, (1, 300))
    with torch.no_grad():
        sizes = []
        for model in (ours, theirs):
            cache = model.new_cache()
            for piece in ids.split([260] + [1] * 40, dim=1):
                model(piece, past_key_values=cache)
            sizes.append(cache.nbytes())
    assert sizes[0] <= 0.76 * sizes[1]


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("length", [1, 3, 9])
def test_state_bytes_are_what_is_allocated(options: dict, length: int) -> None:
    mixer, (x, positions) = make(**options), inputs(rows=3, length=length)
    _, cache = in_pieces(mixer, x, positions, None, (length,))
    assert cache.nbytes() == 3 * mixer.state_bytes(length, torch.float64)
    assert cache.croppable == (mixer.cache_kind(mixer.options) == "kv")


def test_flops_are_those_of_softmax() -> None:
    config = FarspanConfig(vocab_size=1, hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    for window in (None, 5):
        softmax = SoftmaxMixer(config, SoftmaxOptions(sliding_window=window), 0)
        assert make(sliding_window=window).flops_per_token(20) == softmax.flops_per_token(20)


def test_crop_takes_tokens_back() -> None:
    mixer, (x, positions) = make(), inputs(length=12)
    for mask in (None, torch.tensor([[1] * 12, [0, 0, 1, 1, 1, 1, 0, 1, 0, 1, 1, 1]]).bool()):
        places = positions if mask is None else (mask.long().cumsum(-1) - 1).clamp(min=0)
        whole = mixer(x, layout=SequenceLayout(places, mask))
        _, cache = in_pieces(mixer, x[:, :9], places[:, :9], None if mask is None else mask[:, :9], (9,))
        cache.crop(3)
        tail = SequenceLayout(places[:, 6:], None if mask is None else mask[:, 6:])
        again = mixer(x[:, 6:], layout=tail, cache=cache)
        real = slice(None) if mask is None else mask[:, 6:]
        assert_close(again[real], whole[:, 6:][real], tolerances.FLOAT64)
        assert "positions" not in cache.tensors
    with pytest.raises(ConfigError, match="CoefficientCache cannot take back 2"):
        CoefficientCache(window=4).crop(2)


def test_prompt_lookup_is_exact() -> None:
    model, ids = tiny("collinear"), torch.randint(1, 61, (1, 9))
    runs = [
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, **options)
        for options in ({}, {"prompt_lookup_num_tokens": 3})
    ]
    assert runs[0].tolist() == runs[1].tolist()


@pytest.mark.parametrize("rope", [{"rope_type": kind, "factor": 4.0} for kind in ("linear", "dynamic", "yarn")])
@pytest.mark.parametrize("form", ["slack", "strict"])
def test_scaled_rope_keeps_one_base_for_a_generation(form: str, rope: dict) -> None:
    options = {"mixer_options": {"collinear": {"form": form}}}
    model = tiny("collinear", max_position_embeddings=12, rope_parameters=rope, **options)
    ids = torch.randint(1, 61, (1, 9))
    with torch.no_grad():
        cache = model.new_cache(context_length=30)
        more = torch.randint(1, 61, (1, 21))
        steps = [model(piece, past_key_values=cache).logits for piece in (ids, *more.split(1, dim=1))]
        full = model(torch.cat((ids, more), dim=1), context_length=30, use_cache=False).logits
    torch.testing.assert_close(torch.cat(steps, dim=1), full, atol=1e-4, rtol=1e-4)


def test_dynamic_rope_has_no_memory_of_longer_calls() -> None:
    model = tiny("collinear", max_position_embeddings=12, rope_parameters={"rope_type": "dynamic", "factor": 4.0})
    short, long = torch.randint(1, 61, (1, 8)), torch.randint(1, 61, (1, 40))
    with torch.no_grad():
        before = model(short).logits
        model(long)
        assert torch.equal(model(short).logits, before)


def test_published_names_round_trip() -> None:
    llama, neox = (
        make(),
        make(config={"num_key_value_heads": 4}, attention_bias=True, partial_rotary_factor=0.5, tie="head"),
    )
    for mixer, entries in ((llama, llama_attention_entries()), (neox, neox_attention_entries(32, 4, 4))):
        published = to_published(mixer.state_dict(), entries)
        again = to_ours(published, entries)
        assert again.keys() == mixer.state_dict().keys()
        assert all(torch.equal(again[name], x) for name, x in mixer.state_dict().items())
    fused = published["query_key_value.weight"].reshape(4, 3, 8, 32)
    assert torch.equal(fused[2, 1], neox.t_proj.weight[16:24])
    assert torch.equal(published["query_key_value.bias"].reshape(4, 3, 8)[1, 2], neox.v_proj.bias[8:16])
    torch.testing.assert_close(published["rotary_emb.inv_freq"], torch.tensor([1.0, 0.01]))
    stretched = published | {"rotary_emb.inv_freq": torch.zeros(2)}
    assert to_ours(stretched, entries).keys() == again.keys()  # recomputed, never read


def test_names_inside_a_larger_module() -> None:
    entries = [entry.under("attention.", "mixer.") for entry in neox_attention_entries(32, 4, 8)]
    mixer = make(config={"num_key_value_heads": 4}, attention_bias=True)
    state = {f"mixer.{name}": x for name, x in mixer.state_dict().items()}
    published = to_published(state, entries)
    assert "attention.query_key_value.bias" in published and "attention.rotary_emb.inv_freq" in published
    assert all(torch.equal(to_ours(published, entries)[name], x) for name, x in state.items())


def test_a_plain_key_projection_is_not_taken_for_t() -> None:
    published = to_published(make().state_dict(), llama_attention_entries())
    published["k_proj.weight"] = published.pop("t_proj.weight")
    with pytest.raises(CheckpointError, match=r"missing \['t_proj.weight'\], not known \['k_proj.weight'\]"):
        to_ours(published, llama_attention_entries())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"form": "slak"}, "did you mean 'slack'"),
        ({"tie": "heads"}, "did you mean 'head'"),
        ({"partial_rotary_factor": 0.0}, r"partial_rotary_factor=0.0 must lie in \(0, 1\]"),
        ({"sliding_window": 0}, "sliding_window=0 must be at least 1"),
        ({"form": "strict", "tie": "head", "partial_rotary_factor": 0.5}, "needs tied rotary pairs"),
        ({"forms": "slack"}, "did you mean 'form'"),
    ],
)
def test_wrong_options_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FarspanConfig(mixers=["collinear"], mixer_options={"collinear": options})


@pytest.mark.parametrize(("config", "factor"), [({"head_dim": 7}, 1.0), ({}, 0.4), ({}, 0.1)])
def test_odd_channels_are_refused(config: dict, factor: float) -> None:
    with pytest.raises(ConfigError, match="tied in pairs"):
        make(config=config, partial_rotary_factor=factor)
