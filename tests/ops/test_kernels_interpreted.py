"""The Triton kernels, run by Triton's interpreter on the CPU, against the references, forward and gradient.

`TRITON_INTERPRET=1 pytest tests/ops/test_kernels_interpreted.py`: the mode is fixed where kernels are defined, so they
need a process of their own. Chunks of 16 rows keep them fast; races, layouts and 16-bit products are for a real GPU.
"""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from farspan.ops import cosine_attention
from farspan.ops._backend import _implementations
from farspan.ops.cosine import triton as cosine_triton
from farspan.ops.cosine.triton import cosine_attention_triton
from farspan.ops.gated_linear import launches as kernels
from farspan.ops.gated_linear import plan, rows, tiles
from farspan.ops.gated_linear import triton as gated_linear_triton
from farspan.ops.gated_linear.launches import Form
from farspan.ops.gated_linear.triton import gated_linear_attention_triton
from farspan.ops.metala.triton import metala_attention_triton
from farspan.ops.ssd import triton as ssd_triton
from farspan.ops.ssd.triton import state_space_duality_triton
from tests import tolerances
from tests.ops import test_cosine, test_gated_linear, test_metala, test_ssd
from tests.ops.checks import assert_close, assert_same, boundaries, cast, outputs_and_gradients

# Interpreted products of infinite entries, which the kernels select away.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")

REFERENCE = test_gated_linear.attend("reference")
OPTIONS = {
    "scale": 5**-0.5,
    "decay_normalizer": 16.0,
    "augmentation_inside": True,
    "normalize": True,
    "norm_eps": 1e-5,
    "padding_mask": None,
    "cu_seqlens": None,
}


def forget_sizes() -> None:
    """What is remembered of launches holds sizes of blocks that a test patches, and was not asked for by them."""
    for remembered in (rows._constants, kernels._device_tiles, kernels._constants, ssd_triton._constants):
        remembered.cache_clear()


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tiles, "CHUNK", 16)
    monkeypatch.setattr(kernels, "NARROWEST", 16)
    monkeypatch.setattr(rows, "NARROWEST", 16)
    monkeypatch.setattr(plan, "PROGRAMS", 1)
    monkeypatch.setattr(plan, "SEGMENT", (1, 2))
    forget_sizes()
    yield
    forget_sizes()


def gated(cu_seqlens: Tensor | None = None) -> partial:
    return partial(gated_linear_attention_triton, scale=5**-0.5, cu_seqlens=cu_seqlens)


def metala(**options: object) -> partial:
    return partial(metala_attention_triton, **OPTIONS | options)


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("length", [1, 16, 37, 75])
def test_gated_linear_matches_reference(length: int, decay: str) -> None:
    x = test_gated_linear.make(length, decay, batch=1)
    want = outputs_and_gradients(REFERENCE, x)
    assert_same(outputs_and_gradients(gated(), cast(x, torch.float32)), want, tolerances.FLOAT32)


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("widest", [2, 4])
def test_heads_wider_than_the_kernels_match_reference(monkeypatch: pytest.MonkeyPatch, widest: int, decay: str) -> None:
    monkeypatch.setattr(tiles, "WIDEST", widest)
    x, options = test_gated_linear.make(37, decay, batch=1, sequences=3), {"cu_seqlens": boundaries([20, 0, 17])}
    want = outputs_and_gradients(test_gated_linear.attend("reference", **options), x)
    assert_same(outputs_and_gradients(gated(**options), cast(x, torch.float32)), want, tolerances.FLOAT32)


@pytest.mark.usefixtures("duality")
def test_metala_and_duality_of_such_heads_match_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (tiles, ssd_triton):
        monkeypatch.setattr(module, "WIDEST", 2)
    x = test_metala.make(20, batch=1)
    want = outputs_and_gradients(test_metala.attend("reference"), x)
    assert_same(outputs_and_gradients(metala(), cast(x, torch.float32)), want, tolerances.FLOAT32)
    x = test_ssd.make(20, batch=1)
    want = outputs_and_gradients(test_ssd.attend("reference"), x)
    assert_same(outputs_and_gradients(test_ssd.attend("torch"), cast(x, torch.float32)), want, tolerances.FLOAT32)


@pytest.mark.usefixtures("duality")
def test_halved_chunks_and_heads_match_reference(monkeypatch: pytest.MonkeyPatch, cosine: partial) -> None:
    monkeypatch.setattr(tiles, "asked_family", lambda device: 8)
    for module in (kernels, rows, ssd_triton):
        monkeypatch.setattr(module, "family", lambda device: 8)
    monkeypatch.setattr(tiles, "CHUNK", 32)
    forms = (
        (REFERENCE, partial(gated(), scale=70**-0.5), test_gated_linear.make(40, "channel", batch=1, width=70)),
        (REFERENCE, gated(), test_gated_linear.make(20, "extreme", batch=1, heads=1)),
        (test_metala.attend("reference"), metala(), test_metala.make(40, batch=1)),
        (test_cosine.attend("reference"), cosine, test_cosine.make(40)),
        (test_ssd.attend("reference"), test_ssd.attend("torch"), test_ssd.make(40, batch=1)),
    )
    for reference, call, x in forms:
        want = {name: t.nan_to_num() for name, t in outputs_and_gradients(reference, x).items()}
        assert_same(outputs_and_gradients(call, cast(x, torch.float32)), want, tolerances.FLOAT32)


@pytest.mark.parametrize("decay", ["forgetful", "extreme", "zero"])
def test_extreme_decays_match_reference(decay: str) -> None:
    x = test_gated_linear.make(18, decay, batch=1, heads=1)
    want = outputs_and_gradients(REFERENCE, x)
    want["d_log_decay"] = want["d_log_decay"].nan_to_num()
    assert_same(outputs_and_gradients(gated(), cast(x, torch.float32)), want, tolerances.FLOAT32)


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_float16_takes_the_fast_sums(decay: str) -> None:
    x = cast(test_gated_linear.make(40, decay, batch=1), torch.float16)
    x["initial_state"] = x["initial_state"].float()
    want = outputs_and_gradients(REFERENCE, cast(x, torch.float64))
    got = outputs_and_gradients(gated(), x)
    assert got["out"].dtype == torch.float16
    assert_same(got, want, tolerances.BFLOAT16)


# Of one segment each, and, packed, of several; after each the tokens of the first chunks.
GIVEN = pytest.mark.parametrize(
    ("lengths", "first"), [([1], slice(1)), ([16], slice(16)), ([1, 48], slice(17)), ([33, 1], slice(33, 34))]
)


@pytest.mark.parametrize("decay", ["head", "channel"])
@GIVEN
def test_the_gradient_of_decays_reads_a_given_state_in_float32(lengths: list[int], first: slice, decay: str) -> None:
    x = cast(test_gated_linear.make(sum(lengths), decay, batch=1, sequences=len(lengths)), torch.bfloat16)
    x |= {name: x[name].float() for name in ("log_decay", "initial_state")}
    x["initial_state"] *= 1 + 2.0**-9  # what 16 bits would round
    x["q"], x["k"] = torch.zeros_like(x["q"]), torch.zeros_like(x["k"])  # the state alone decays
    cu_seqlens = boundaries(lengths)
    want = outputs_and_gradients(test_gated_linear.attend("reference", cu_seqlens=cu_seqlens), cast(x, torch.float64))
    got = outputs_and_gradients(gated(cu_seqlens), x)
    assert_close(got["d_log_decay"][:, first], want["d_log_decay"][:, first], tolerances.FLOAT32)


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_the_range_of_decays_takes_no_digit_of_float32(decay: str) -> None:
    x = test_gated_linear.make(16, decay, batch=1)
    x["log_decay"] = (x["log_decay"] / 16).float().double()
    x["log_decay"][:, 1:9] -= 9  # e^40 to e^-40 about the centre, where an exponent in float32 is off by 2e-6
    want = outputs_and_gradients(REFERENCE, x)
    assert_same(outputs_and_gradients(gated(), cast(x, torch.float32)), want, 1e-6)


def test_pairs_give_the_gradient_of_one_decay_per_head_unrounded() -> None:
    x = cast(test_gated_linear.make(16, "head", batch=1), torch.bfloat16)
    x |= {"log_decay": x["log_decay"].float(), "initial_state": None}
    gradients = []
    for call, dtype in ((REFERENCE, torch.float64), (gated(), None)):
        leaves = {name: t if t is None else t.to(dtype or t.dtype) for name, t in x.items()}
        leaves["log_decay"] = leaves["log_decay"].clone().requires_grad_()
        out, _ = call(**leaves)
        gradients += torch.autograd.grad(out, leaves["log_decay"], leaves["v"].to(out.dtype))
    assert_close(gradients[1], gradients[0], tolerances.FLOAT32)


@pytest.mark.usefixtures("duality")
@GIVEN
def test_the_gradient_of_steps_does_so_too(lengths: list[int], first: slice) -> None:
    x = test_ssd.make(sum(lengths), batch=1, sequences=len(lengths))
    x |= {name: torch.zeros_like(x[name]) for name in ("b", "c", "x")}
    x["initial_state"] = x["initial_state"].bfloat16().double() * (1 + 2.0**-9)
    cu_seqlens = boundaries(lengths)
    want = outputs_and_gradients(test_ssd.attend("reference", cu_seqlens=cu_seqlens), x)["d_dt"]
    x = {name: t.to(torch.bfloat16 if name in ("b", "c", "x") else torch.float32) for name, t in x.items()}
    got = outputs_and_gradients(test_ssd.attend("torch", cu_seqlens=cu_seqlens), x)["d_dt"]
    assert_close(got[:, first], want[:, first], tolerances.FLOAT32)


@pytest.mark.parametrize("lengths", [[20, 0, 1, 34], [0, 0, 17], [48, 0]])
def test_packed_documents_match_reference(lengths: list[int]) -> None:
    x = test_gated_linear.make(sum(lengths), batch=1, sequences=len(lengths))
    cu_seqlens = boundaries(lengths)
    want = outputs_and_gradients(test_gated_linear.attend("reference", cu_seqlens=cu_seqlens), x)
    assert_same(outputs_and_gradients(gated(cu_seqlens), cast(x, torch.float32)), want, tolerances.FLOAT32)


def test_batch_rows_do_not_mix() -> None:
    x = test_gated_linear.make(21, batch=3)
    want = outputs_and_gradients(REFERENCE, x)
    assert_same(outputs_and_gradients(gated(), cast(x, torch.float32)), want, tolerances.FLOAT32)


def test_empty_sequences_return_the_initial_state() -> None:
    x = cast(test_gated_linear.make(0), torch.float32)
    out, state = gated()(**x)
    assert out.shape == (2, 0, 2, 7)
    assert torch.equal(state, x["initial_state"])


@pytest.mark.parametrize(
    "options",
    [{}, {"normalize": False, "augmentation_inside": False}, {"norm_eps": 1e-2, "decay_normalizer": 4.0}],
)
@pytest.mark.parametrize("length", [1, 50])
def test_metala_matches_reference(length: int, options: dict[str, object]) -> None:
    x = test_metala.make(length, batch=1)
    want = outputs_and_gradients(test_metala.attend("reference", **options), x)
    assert_same(outputs_and_gradients(metala(**options), cast(x, torch.float32)), want, tolerances.FLOAT32)


@pytest.mark.parametrize("extreme", [False, True])
def test_channels_beyond_those_of_a_program_match_reference(extreme: bool) -> None:
    x = test_metala.make(20, batch=1, width=20)
    if extreme:  # the channel that makes it so is of the second program
        x["gate_logits"][..., 19] = -200.0
    options = {"decay_normalizer": 1.0, "scale": 20**-0.5}
    want = outputs_and_gradients(test_metala.attend("reference", **options), x)
    assert_same(outputs_and_gradients(metala(**options), cast(x, torch.float32)), want, tolerances.FLOAT32)


@pytest.mark.parametrize("values", [17, 130])  # more than a block of V, more than a row that a program holds whole
def test_metala_of_wide_values_matches_reference(values: int) -> None:
    x = test_metala.make(20, batch=1, value_width=values)
    want = outputs_and_gradients(test_metala.attend("reference"), x)
    assert_same(outputs_and_gradients(metala(), cast(x, torch.float32)), want, tolerances.FLOAT32)


def test_metala_without_augmentation_and_with_own_key() -> None:
    x = test_metala.make(20, batch=1)
    x["augmentation"] = None
    want = outputs_and_gradients(test_metala.attend("reference"), x)
    assert_same(outputs_and_gradients(metala(), cast(x, torch.float32)), want, tolerances.FLOAT32)
    x["key"] = torch.randn_like(x["q"])
    want = outputs_and_gradients(test_metala.attend("reference"), x)
    assert_same(outputs_and_gradients(metala(), cast(x, torch.float32)), want, tolerances.FLOAT32)


def test_metala_extreme_gates_match_reference() -> None:
    x = test_metala.make(17, batch=1)
    x["gate_logits"] = torch.tensor([-1e3, -50.0, 0.0, 50.0, 1e3]).double()[torch.randint(5, x["q"].shape)]
    options = {"decay_normalizer": 1.0}
    want = outputs_and_gradients(test_metala.attend("reference", **options), x)
    assert_same(outputs_and_gradients(metala(**options), cast(x, torch.float32)), want, tolerances.FLOAT32)


def test_the_gradient_of_the_augmentation_of_a_few_tokens_is_not_rounded() -> None:
    z = torch.linspace(-4, 4, 6).half().expand(1, 3, 1, 6)
    weight = torch.zeros(1, 6).requires_grad_()  # u = 0, where the slope of the sigmoid is 1/4
    options = {"augmentation_inside": False, "normalize": False, "key": None, "initial_state": None}
    out, _ = metala(**options)(torch.ones_like(z), z, torch.ones_like(z), weight)
    (gradient,) = torch.autograd.grad(out.sum(), [weight])
    keys = -torch.expm1(torch.nn.functional.logsigmoid(z[0].double()) / 16)
    assert_close(gradient, 6 / 4 * keys.sum(0), tolerances.FLOAT32)


def test_padding_neither_decays_nor_writes() -> None:
    x = cast(test_metala.make(20, batch=1), torch.float32)
    keep = torch.rand(1, 20) < 0.6
    out, state = metala(padding_mask=keep)(**x)
    want, want_state = test_metala.attend("reference", padding_mask=keep)(**x)
    assert_close(out[keep], want[keep], tolerances.FLOAT32)
    assert_close(state, want_state, tolerances.FLOAT32)


@pytest.fixture
def cosine(monkeypatch: pytest.MonkeyPatch) -> partial:
    """Cosine attention by its kernel, which the CPU does not choose by itself."""
    monkeypatch.setitem(_implementations["cosine_attention"], "torch", cosine_attention_triton)
    return test_cosine.attend("torch")


@pytest.mark.parametrize("options", [{}, {"norm_position": "query"}, {"eps": 2.0}], ids=str)
@pytest.mark.parametrize("length", [1, 16, 75])
def test_cosine_matches_reference(cosine: partial, length: int, options: dict[str, object]) -> None:
    x = test_cosine.make(length)
    want = outputs_and_gradients(test_cosine.attend("reference", **options), x)
    assert_same(outputs_and_gradients(partial(cosine, **options), cast(x, torch.float32)), want, tolerances.FLOAT32)


def test_cosine_of_packed_and_of_padded_documents_matches_reference(cosine: partial) -> None:
    lengths = [20, 0, 1, 54]
    options = {"cu_seqlens": boundaries(lengths), "past": [3, 0, 5, 0], "sequences": 4}
    x = test_cosine.make(75, batch=1, sequences=4)
    want = outputs_and_gradients(test_cosine.attend("reference", **options), x)
    got = outputs_and_gradients(test_cosine.attend("torch", **options), cast(x, torch.float32))
    assert_same(got, want, tolerances.FLOAT32)
    x, mask = test_cosine.make(40), torch.rand(2, 40) < 0.6
    want = outputs_and_gradients(test_cosine.attend("reference", padding_mask=mask), x)
    assert_same(
        outputs_and_gradients(partial(cosine, padding_mask=mask), cast(x, torch.float32)), want, tolerances.FLOAT32
    )


def test_cosine_without_state_weights_or_gradient_of_the_state(cosine: partial) -> None:
    x = cast(test_cosine.make(50, state=False), torch.float32)
    x["exponent"] = None
    leaves = {name: None if t is None else t.requires_grad_() for name, t in x.items()}
    inputs = [leaf for leaf in leaves.values() if leaf is not None]
    want = torch.autograd.grad(cosine_attention(**leaves, backend="reference")[0].square().sum(), inputs)
    got = torch.autograd.grad(cosine_attention(**leaves, backend="torch")[0].square().sum(), inputs)
    for name, ours, theirs in zip(leaves, got, want, strict=False):
        assert_close(ours, theirs, tolerances.FLOAT32, name)


@pytest.fixture
def duality(monkeypatch: pytest.MonkeyPatch) -> None:
    """State space duality by its kernels, which the CPU does not choose by itself."""
    monkeypatch.setitem(_implementations["state_space_duality"], "torch", state_space_duality_triton)
    ssd_triton._constants.cache_clear()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 16, 75])
@pytest.mark.usefixtures("duality")
def test_state_space_duality_matches_reference(length: int, groups: int) -> None:
    x = test_ssd.make(length, groups=groups, batch=1)
    want = outputs_and_gradients(test_ssd.attend("reference"), x)
    assert_same(outputs_and_gradients(test_ssd.attend("torch"), cast(x, torch.float32)), want, tolerances.FLOAT32)


@pytest.mark.usefixtures("duality")
def test_state_space_duality_of_packed_documents_without_skip_matches_reference() -> None:
    lengths = [20, 0, 1, 34]
    x, options = test_ssd.make(55, batch=1, sequences=4), {"cu_seqlens": boundaries(lengths), "dt_limit": (0.1, 90.0)}
    del x["d"]
    want = outputs_and_gradients(test_ssd.attend("reference", **options), x)
    got = outputs_and_gradients(test_ssd.attend("torch", **options), cast(x, torch.float32))
    assert_same(got, want, tolerances.FLOAT32)
    x["dt"] = 10 * x["dt"]  # decays from 1 to nothing
    want = outputs_and_gradients(test_ssd.attend("reference", **options), x)
    got = outputs_and_gradients(test_ssd.attend("torch", **options), cast(x, torch.float32))
    assert_same(got, want, tolerances.FLOAT32)


@pytest.mark.parametrize("change", test_ssd.EXTREMES.values(), ids=test_ssd.EXTREMES)
@pytest.mark.usefixtures("duality")
def test_state_space_duality_with_extreme_steps_and_decays_matches_reference(change: dict[str, float]) -> None:
    x = test_ssd.make(40, batch=1)
    x |= {name: torch.full_like(x[name], value) for name, value in change.items()}
    want = outputs_and_gradients(test_ssd.attend("reference"), x)
    got = outputs_and_gradients(test_ssd.attend("torch"), cast(x, torch.float32))
    for name in want:  # gradients of what is forgotten are differences of the outputs' terms
        assert_close(got[name], want[name], tolerances.FLOAT32, name, largest=want["out"].abs().max())


@pytest.mark.usefixtures("duality")
def test_what_is_kept_after_much_was_forgotten_is_as_exact_as_float32() -> None:
    x = test_ssd.make(16, batch=1)
    x["dt"][:, :8], x["dt"][:, 8:], x["a"] = 60.0, -3.0, -torch.ones_like(x["a"])
    want = outputs_and_gradients(test_ssd.attend("reference"), x)
    got = outputs_and_gradients(test_ssd.attend("torch"), cast(x, torch.float32))
    assert_close(got["state"], want["state"], 1e-6, "state")  # differences of sums near 480, which float32 has to 3e-5


@pytest.mark.usefixtures("duality")
def test_steps_that_are_given_match_reference() -> None:
    x, options = test_ssd.make(40, batch=1), {"dt_softplus": False, "dt_limit": (0.1, 2.0)}
    del x["dt_bias"]
    want = outputs_and_gradients(test_ssd.attend("reference", **options), x)
    got = outputs_and_gradients(test_ssd.attend("torch", **options), cast(x, torch.float32))
    assert_same(got, want, tolerances.FLOAT32)


@pytest.mark.parametrize("packed", [False, True])
def test_nodes_are_registered_as_pytorch_wants_them(packed: bool) -> None:
    # What no chunk reaches is not written, and differs from call to call: shapes alone are compared.
    check = partial(torch.library.opcheck, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    bounds = boundaries([20, 0, 1, 34]) if packed else None
    x = cast(test_ssd.make(55, batch=1, sequences=4 if packed else 1), torch.float32)
    names = ("c", "b", "x", "dt", "a", "d", "dt_bias", "initial_state")
    inputs, options = [*(x[name] for name in names), bounds], (True, 0.0, 9.0)
    out, final, *saved = ssd_triton.duality_node(*inputs, *options)
    check(ssd_triton.duality_node, (*inputs, *options))
    check(ssd_triton.duality_gradient_node, (out, final, *inputs, *saved, *options))
    q, k, v = torch.randn(3, 1, 55, 2, 6).unbind(0)
    inputs, options = [q, k, v, torch.rand(1, 55), torch.randn(2), None, bounds], (False, 1e-6)
    out, final, *saved = cosine_triton.cosine_node(*inputs, *options)
    check(cosine_triton.cosine_node, (*inputs, *options))
    check(cosine_triton.cosine_gradient_node, (out, final, *inputs, *saved, *options))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_nodes_of_gated_linear_attention_are_registered_likewise(fused: bool, packed: bool) -> None:
    check = partial(torch.library.opcheck, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    bounds = boundaries([5, 0, 12]) if packed else None
    q, k, gate = torch.randn(3, 1, 17, 1, 6).unbind(0)
    v, state = torch.randn(1, 17, 1, 7), torch.randn(3 if packed else 1, 1, 6, 7)
    inputs, form = [q, k, v, -gate.abs(), None, state], Form(0.5)
    if fused:
        inputs, form = [q, None, v, gate, torch.randn(1, 6), None], Form(0.5, from_logits=True, normalize=True)
    out, final, *saved = gated_linear_triton.attention_node(*inputs, bounds, *form)
    check(gated_linear_triton.attention_node, (*inputs, bounds, *form))
    check(gated_linear_triton.attention_gradient_node, (out, final, *inputs, bounds, out, *saved, *form))
