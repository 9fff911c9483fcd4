"""The ssd mixer: published forms, initialisations, positions, memory, padding, and looking both ways."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from farspan import FarspanConfig, FarspanForCausalLM
from farspan.errors import ConfigError
from farspan.mixers import SequenceLayout
from farspan.mixers.ssd import SSDMixer, SSDOptions
from farspan.models.convert import cheems
from farspan.models.convert.names import to_ours, to_published
from farspan.ops import varlen
from tests import tolerances
from tests.ops.checks import assert_close, boundaries

MAMBA2 = {"rope": False, "groups": 1, "state_size": 6, "conv_size": 4, "gated_norm": True}
FORMS = {
    "default": {},
    "module": cheems.ssd_module_options(state_size=6, groups=2),
    "layer": cheems.ssd_layer_options() | {"padding_writes": False},
    "layer_with_bias": cheems.ssd_layer_options(bias=True) | {"padding_writes": False},
    "mamba2": MAMBA2,
    "wide": {"value_dim": 64, "state_size": 4, "groups": 2, "conv_size": 3},
}


def make(options: dict, *, causal: bool = True, **fields: object) -> SSDMixer:
    """A float64 mixer of width 32 with four heads whose every parameter is random, with a decay that forgets."""
    config = FarspanConfig(vocab_size=1, hidden_size=32, num_attention_heads=4, causal=causal, **fields)
    mixer = SSDMixer(config, SSDOptions(**options), layer_idx=0).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=0.3)
        if not mixer.options.log_decay:
            mixer.decay.copy_(-mixer.decay.abs())
    return mixer


def tokens(rows: int, length: int) -> Tensor:
    return torch.randn(rows, length, 32, generator=torch.Generator().manual_seed(length), dtype=torch.float64)


def layout(x: Tensor, mask: Tensor | None = None, start: int = 0, cu_seqlens: Tensor | None = None) -> SequenceLayout:
    if cu_seqlens is not None:
        return SequenceLayout(varlen.position_ids(cu_seqlens).unsqueeze(0), cu_seqlens=cu_seqlens)
    if mask is not None:
        return SequenceLayout((mask.long().cumsum(-1) - 1).clamp(min=0), mask)
    return SequenceLayout(torch.arange(x.shape[1]).expand(x.shape[0], -1) + start)


@pytest.fixture(params=sorted(FORMS))
def form(request: pytest.FixtureRequest) -> dict:
    return FORMS[request.param]


def test_the_module_is_the_published_formula() -> None:
    """Every head by itself, step by step, from the published parameters; heads take turns at the groups."""
    mixer, x = make(FORMS["module"]), tokens(1, 7)
    published = to_published(mixer.state_dict(), cheems.ssd_module_entries())
    project = {
        name: x[0] @ published[f"{name}.weight"].T + published[f"{name}.bias"]
        for name in ("x_proj", "B_proj", "C_proj", "dt_proj")
    }
    heads = []
    for h in range(4):
        state, group, outputs = torch.zeros(8, 6, dtype=torch.float64), h % 2, []
        for t in range(7):
            step = torch.nn.functional.softplus(project["dt_proj"][t, h])
            values = project["x_proj"][t, 8 * h : 8 * h + 8]
            b, c = (project[name][t, 6 * group : 6 * group + 6] for name in ("B_proj", "C_proj"))
            state = (-step * published["A_log"][h].exp()).exp() * state + step * torch.outer(values, b)
            outputs.append(state @ c + published["D"][h] * values)
        heads.append(torch.stack(outputs))
    want = torch.cat(heads, dim=-1) @ published["out_proj.weight"].T + published["out_proj.bias"]
    assert_close(mixer(x, layout=layout(x))[0], want, tolerances.FLOAT64)


@pytest.mark.parametrize(
    ("options", "entries"),
    [
        (FORMS["module"], cheems.ssd_module_entries()),
        (cheems.ssd_layer_options(), cheems.ssd_layer_entries()),
        (cheems.ssd_layer_options(bias=True), cheems.ssd_layer_entries(bias=True)),
    ],
    ids=["module", "layer", "layer_with_bias"],
)
def test_conversion_round_trip_is_bitwise(options: dict, entries: list) -> None:
    ours = make(options).state_dict()
    again = to_ours(to_published(ours, entries), entries)
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], ours[name]) for name in ours)


@given(length=st.integers(2, 30), data=st.data())
def test_prefill_and_steps_equal_one_pass(length: int, data: st.DataObject) -> None:
    options = FORMS[data.draw(st.sampled_from(sorted(FORMS)))]
    mixer, x, cut = make(options), tokens(2, length), data.draw(st.integers(1, length - 1))
    whole = mixer.new_cache()
    with torch.no_grad():
        out = mixer(x, layout=layout(x), cache=whole)
        cache = mixer.new_cache()
        parts = [mixer(x[:, :cut], layout=layout(x[:, :cut]), cache=cache)]
        for t in range(cut, length):
            parts.append(mixer(x[:, t : t + 1], layout=layout(x[:, t : t + 1], start=t), cache=cache))
    assert_close(torch.cat(parts, dim=1), out, tolerances.FLOAT32_STEP)  # angles are float32
    for name, state in whole.tensors.items():
        assert_close(cache.get(name), state, tolerances.FLOAT32_STEP)


def test_the_future_does_not_change_the_past(form: dict) -> None:
    mixer, x = make(form), tokens(2, 40)
    changed = torch.cat((x[:, :25], x[:, 25:].flip(1)), dim=1)
    now, then = (mixer(inputs, layout=layout(inputs)) for inputs in (x, changed))
    assert_close(then[:, :25], now[:, :25], tolerances.FLOAT64)


def test_packed_documents_equal_separate_ones(form: dict) -> None:
    for causal in (True, False):
        mixer, x, bounds = make(form, causal=causal), tokens(1, 40), boundaries([13, 0, 1, 26])
        packed = mixer(x, layout=layout(x, cu_seqlens=bounds))
        for start, end in varlen.spans(bounds):
            if end > start:
                alone = mixer(x[:, start:end], layout=layout(x[:, start:end]))
                assert_close(packed[:, start:end], alone, tolerances.FLOAT64)


@pytest.mark.parametrize("causal", [True, False])
@given(seed=st.integers(0, 1000))
def test_padding_at_any_place_changes_nothing(causal: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mixer, x = make(list(FORMS.values())[seed % len(FORMS)], causal=causal), tokens(2, 12)
    mask = torch.rand(2, 12, generator=generator) < 0.6
    mask[:, 5] = True
    cache = mixer.new_cache() if causal else None
    out = mixer(x.masked_fill(~mask.unsqueeze(-1), 1e3), layout=layout(x, mask), cache=cache)
    for row in range(2):
        alone, memory = x[row : row + 1, mask[row]], mixer.new_cache() if causal else None
        want = mixer(alone, layout=layout(alone), cache=memory)
        assert_close(out[row : row + 1, mask[row]], want, tolerances.FLOAT64)
        if causal:
            for name, state in memory.tensors.items():
                assert_close(cache.get(name)[row : row + 1], state, tolerances.FLOAT64)


def test_released_padding_zeroes_the_inputs_and_nothing_else() -> None:
    mixer, x = make(cheems.ssd_layer_options(bias=True)), tokens(1, 10)
    mask = torch.arange(10).expand(1, -1) >= 4
    out = mixer(x, layout=SequenceLayout(layout(x).positions, mask))
    zeroed = x * mask.unsqueeze(-1)
    assert torch.equal(out, mixer(zeroed, layout=layout(zeroed)))
    alone = mixer(x[:, 4:], layout=layout(x[:, 4:]))
    assert (out[:, 4:] - alone).abs().max() > 1e-3  # the biases of padding are in the state
    unbiased = make(cheems.ssd_layer_options())
    out, alone = unbiased(x, layout=SequenceLayout(layout(x).positions, mask)), x[:, 4:]
    assert_close(out[:, 4:], unbiased(alone, layout=layout(alone)), tolerances.FLOAT32_STEP)


@given(offset=st.integers(0, 100))
def test_only_relative_positions_count(offset: int) -> None:
    mixer, x = make({}), tokens(1, 20)
    with torch.no_grad():
        moved, here = (mixer(x, layout=layout(x, start=start)) for start in (offset, 0))
    assert_close(moved, here, tolerances.FLOAT32)


def test_rotation_is_what_makes_positions_count() -> None:
    x = tokens(1, 20)
    for rope in (True, False):
        mixer = make({"rope": rope})
        apart = SequenceLayout(3 * torch.arange(20).unsqueeze(0))
        moved = (mixer(x, layout=apart) - mixer(x, layout=layout(x))).abs().max()
        assert (moved > 1e-3) == rope


def test_both_ways_is_the_sum_over_all_tokens() -> None:
    """Every pair with the rotation of its signed distance; a token counts itself in both directions."""
    mixer, x = make({"skip": False, "groups": 2}, causal=False), tokens(1, 9)
    causal = make({"skip": False, "groups": 2})
    causal.load_state_dict(mixer.state_dict())
    backwards = SequenceLayout(layout(x).positions.flip(1))
    want = causal(x, layout=layout(x)) + causal(x.flip(1), layout=backwards).flip(1)
    assert_close(mixer(x, layout=layout(x)), want, tolerances.FLOAT64)
    nearer = x.clone()
    nearer[:, 7] = 0.0
    assert (mixer(nearer, layout=layout(x)) - mixer(x, layout=layout(x)))[:, 2].abs().max() > 1e-6


@pytest.mark.parametrize("name", ["module", "mamba2"])
def test_both_ways_turns_round_with_its_input(name: str) -> None:
    mixer, x = make(FORMS[name], causal=False), tokens(2, 15)
    turned = mixer(x.flip(1), layout=layout(x)).flip(1)
    assert_close(turned, mixer(x, layout=layout(x)), tolerances.FLOAT64)


@pytest.mark.parametrize("dt_bias", [True, False])
def test_stable_initialisation_spreads_the_memories(dt_bias: bool) -> None:
    config = FarspanConfig(vocab_size=1, hidden_size=32, num_attention_heads=4)
    mixer = SSDMixer(config, SSDOptions(dt_bias=dt_bias), 0)
    step = torch.nn.functional.softplus(mixer.dt_bias if dt_bias else torch.zeros(4))
    forgotten = step * mixer.decay.exp()
    torch.testing.assert_close(forgotten, torch.tensor([1e-1, 10**-1.0 * 10 ** (-2 / 3), 10 ** (-7 / 3), 1e-3]))


def test_released_initialisations() -> None:
    config = FarspanConfig(vocab_size=1, hidden_size=32, num_attention_heads=4)
    module = SSDMixer(config, SSDOptions(**FORMS["module"], initialization="released"), 0)
    torch.testing.assert_close(module.decay.exp(), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert (module.skip == 1).all() and (module.dt_bias == 0).all()
    layer = SSDMixer(config, SSDOptions(**cheems.ssd_layer_options(), initialization="released"), 0)
    assert (layer.decay == 1).all()
    assert (SSDMixer(config, SSDOptions(**cheems.ssd_layer_options()), 0).decay < 0).all()


@pytest.mark.parametrize("initialization", ["stable", "released"])
def test_a_fresh_model_is_finite_unless_it_is_initialised_as_released(initialization: str) -> None:
    options = cheems.ssd_layer_options() | {"initialization": initialization}
    config = FarspanConfig(
        vocab_size=8, hidden_size=16, num_attention_heads=2, mixers=["ssd"], mixer_options={"ssd": options}
    )
    ids = torch.randint(8, (1, 2048), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = FarspanForCausalLM(config).eval()(ids, use_cache=False).logits
    assert bool(logits.isfinite().all()) == (initialization == "stable")


def test_memory_is_constant_and_as_announced(form: dict) -> None:
    mixer = make(form).float()
    cache, sizes = mixer.new_cache(), []
    with torch.no_grad():
        for t in range(30):
            x = tokens(1, 1).float()
            mixer(x, layout=layout(x, start=t), cache=cache)
            sizes.append(cache.nbytes())
    assert set(sizes) == {mixer.state_bytes(30, torch.float32)}
    assert mixer.state_bytes(5, torch.float64) == 2 * sizes[0]


def test_flops_are_those_counted(form: dict) -> None:
    mixer, x = make(form).float(), tokens(1, 1).float()
    cache = mixer.new_cache()
    with torch.no_grad():
        mixer(x, layout=layout(x), cache=cache)
        with FlopCounterMode(display=False) as counter:
            mixer(x, layout=layout(x, start=1), cache=cache)
    written = 2 * mixer.heads * mixer.state_size * mixer.head_value  # not a matrix product, so not counted
    convolution = 0 if mixer.convolution is None else 2 * mixer.convolution.numel()
    assert mixer.flops_per_token(1000) == counter.get_total_flops() + written + convolution


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"groups": 3}, "groups=3 does not divide num_attention_heads=4; choose from 1, 2, 4"),
        ({"value_dim": 30}, "value_dim=30 is not divisible by num_attention_heads=4"),
        ({"state_size": 5}, "RoPE rotates pairs of channels, but the state size is 5"),
        ({"state_size": 0}, "state_size=0 must be at least 1"),
        ({"conv_size": -1}, "conv_size=-1 must be at least 1"),
        ({"initialization": "random"}, "initialization='random' is not known"),
    ],
)
def test_wrong_options_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(options)
