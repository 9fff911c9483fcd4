"""Gated linear attention: the reference is the formula, the chunked form is the reference, whatever the decays."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from farspan.ops import gated_linear_attention, gated_linear_attention_step, varlen
from farspan.ops.gated_linear import torch as chunked
from farspan.ops.gated_linear import walk
from tests import tolerances
from tests.ops.checks import Named, assert_close, assert_same, boundaries, cast, outputs_and_gradients

DECAYS = ("none", "head", "channel", "forgetful", "extreme", "zero")
C = chunked.CHUNK


def make(
    length: int,
    decay: str = "channel",
    *,
    batch: int = 2,
    heads: int = 2,
    width: int = 5,
    value_width: int = 7,
    sequences: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Named:
    """Random inputs; `decay` names how fast the state forgets."""
    generator = torch.Generator().manual_seed(length)
    randn = partial(torch.randn, generator=generator, dtype=torch.float64)
    logits = 3 * randn(batch, length, heads, width)
    log_decay = {
        "none": None,
        "head": F.logsigmoid(logits[..., 0]),
        "channel": F.logsigmoid(logits) / 16,
        "forgetful": F.logsigmoid(-40 + logits),
        "extreme": F.logsigmoid(logits.sign() * 10 ** torch.linspace(0, 3, width, dtype=torch.float64)),
        "zero": torch.where(logits > 3, -torch.inf, F.logsigmoid(logits)),
    }[decay]
    tensors = {
        "q": randn(batch, length, heads, width),
        "k": randn(batch, length, heads, width),
        "v": randn(batch, length, heads, value_width),
        "log_decay": log_decay,
        "initial_state": randn(batch if sequences is None else sequences, heads, width, value_width),
    }
    return cast(tensors, dtype)


def attend(backend: str, **options: object) -> partial:
    return partial(gated_linear_attention, output_final_state=True, backend=backend, **options)


def test_reference_equals_the_sum_over_the_past() -> None:
    x = make(6, batch=1, heads=1)
    q, k, v, log_decay, state = (x[name] for name in ("q", "k", "v", "log_decay", "initial_state"))
    out, final = attend("reference", scale=0.5)(**x)
    total = log_decay.cumsum(1)
    for t in range(6):
        want = 0.5 * (q[0, t, 0] * total[0, t, 0].exp()) @ state[0, 0]
        for s in range(t + 1):
            weight = (q[0, t, 0] * k[0, s, 0] * (total[0, t, 0] - total[0, s, 0]).exp()).sum()
            want = want + 0.5 * weight * v[0, s, 0]
        assert_close(out[0, t, 0], want, tolerances.FLOAT64)
    kept = total[0, -1, 0].exp()[:, None] * state[0, 0]
    written = (k[0, :, 0] * (total[0, -1, 0] - total[0, :, 0]).exp()).T @ v[0, :, 0]
    assert_close(final[0, 0], kept + written, tolerances.FLOAT64)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", [1, 2, C - 1, C, C + 1, 3 * C + 5])
def test_chunked_matches_reference(length: int, decay: str) -> None:
    x = make(length, decay)
    want = outputs_and_gradients(attend("reference"), x)
    if decay == "zero":  # the reference's gradient at -inf is 0 times something; the true one is 0
        want["d_log_decay"] = want["d_log_decay"].nan_to_num()
    assert_same(outputs_and_gradients(attend("torch"), x), want, tolerances.FLOAT64)
    assert_same(outputs_and_gradients(attend("torch"), cast(x, torch.float32)), want, tolerances.FLOAT32)


@pytest.mark.parametrize("chunk", [1, 16, 64, 128])
def test_chunk_length_does_not_matter(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = make(130, "extreme")
    want = outputs_and_gradients(attend("reference"), x)
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    assert_same(outputs_and_gradients(attend("torch"), x), want, tolerances.FLOAT64)


@pytest.mark.parametrize("numbers", [1, 3000])
def test_segment_length_does_not_matter(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = make(5 * C + 3, "channel")
    want = outputs_and_gradients(attend("torch"), x)
    monkeypatch.setitem(walk.SEGMENT, False, numbers)
    assert_same(outputs_and_gradients(attend("torch"), x), want, tolerances.FLOAT64)


@pytest.mark.parametrize("decay", ["none", "head", "channel", "forgetful"])
@pytest.mark.parametrize("lengths", [[40, 0, 1, 63, 32], [0, 0, 70], [5, 0], [136]])
def test_packed_documents_equal_separate_ones(lengths: list[int], decay: str) -> None:
    x = make(sum(lengths), decay, batch=1, sequences=len(lengths))
    cu_seqlens = boundaries(lengths)
    want = outputs_and_gradients(attend("reference", cu_seqlens=cu_seqlens), x)
    assert_same(outputs_and_gradients(attend("torch", cu_seqlens=cu_seqlens), x), want, tolerances.FLOAT64)
    for index, (start, end) in enumerate(varlen.spans(cu_seqlens)):
        alone = {name: None if t is None else t[:, start:end] for name, t in x.items()}
        alone["initial_state"] = x["initial_state"][index : index + 1]
        out, state = attend("torch")(**alone)
        assert_close(want["out"][:, start:end], out, tolerances.FLOAT64)
        assert_close(want["state"][index : index + 1], state, tolerances.FLOAT64)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_empty_sequences_return_the_initial_state(backend: str, decay: str) -> None:
    x = make(0, decay)
    out, state = attend(backend)(**x)
    assert out.shape == (2, 0, 2, 7)
    assert torch.equal(state, x["initial_state"])
    nothing = torch.zeros(1, dtype=torch.int32)
    packed = make(0, decay, batch=1, sequences=0)
    out, state = attend(backend, cu_seqlens=nothing)(**packed)
    assert out.shape == (1, 0, 2, 7)
    assert state.shape == (0, 2, 5, 7)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("decay", ["none", "head", "channel", "forgetful"])
@pytest.mark.parametrize("length", [1, 5])
def test_gradients_equal_finite_differences(backend: str, decay: str, length: int) -> None:
    x = make(length, decay, batch=1, width=3, value_width=2)
    names = [name for name, tensor in x.items() if tensor is not None]
    leaves = [x[name].detach().requires_grad_() for name in names]

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return attend(backend)(**dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(call, leaves, atol=tolerances.GRADCHECK)


def test_split_blocks_have_right_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(walk.HALF_RANGE, torch.float64, 1.0)  # so that a short chunk is split to single rows
    x = make(8, "head", batch=1, heads=1, width=3, value_width=2)
    x["log_decay"] = x["log_decay"].unsqueeze(-1).repeat(1, 1, 1, 3) * torch.tensor(
        [1.0, 2.0, 0.1], dtype=torch.float64
    )
    leaves = [tensor.detach().requires_grad_() for tensor in x.values()]
    assert torch.autograd.gradcheck(lambda *t: attend("torch")(**dict(zip(x, t, strict=True))), leaves)


@given(length=st.integers(2, 80), cut=st.floats(0, 1), decay=st.sampled_from(DECAYS))
def test_a_carried_state_continues_the_sequence(length: int, cut: float, decay: str) -> None:
    x = make(length, decay)
    at = round(cut * length)
    state = x.pop("initial_state")
    want, final = attend("torch")(**x, initial_state=state)
    outs = []
    for part in (slice(0, at), slice(at, length)):
        piece = {name: None if t is None else t[:, part] for name, t in x.items()}
        out, state = attend("torch")(**piece, initial_state=state)
        outs.append(out)
    assert_close(torch.cat(outs, dim=1), want, tolerances.FLOAT64)
    assert_close(state, final, tolerances.FLOAT64)


@given(length=st.integers(2, 70), place=st.floats(0, 0.99), decay=st.sampled_from(DECAYS))
def test_future_does_not_change_past(length: int, place: float, decay: str) -> None:
    x, t = make(length, decay), int(place * length)
    before, _ = attend("torch")(**x)
    for name, tensor in x.items():
        if tensor is not None and name != "initial_state":
            tensor[:, t] = tensor[:, t] * 2 - 1
    after, _ = attend("torch")(**x)
    assert_close(after[:, :t], before[:, :t], tolerances.FLOAT64)


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_steps_equal_the_whole_sequence(decay: str) -> None:
    x = make(20, decay, dtype=torch.float32)
    state = x.pop("initial_state")
    want, final = attend("torch")(**x, initial_state=state)
    for t in range(20):
        now = {name: None if tensor is None else tensor[:, t] for name, tensor in x.items()}
        out, state = gated_linear_attention_step(**now, state=state)
        assert_close(out, want[:, t], tolerances.FLOAT32_STEP)
    assert_close(state, final, tolerances.FLOAT32_STEP)


def test_decay_per_head_equals_the_same_decay_in_every_channel() -> None:
    x = make(50, "head")
    want = outputs_and_gradients(attend("torch"), x)
    x["log_decay"] = x["log_decay"].unsqueeze(-1).expand(-1, -1, -1, 5)
    got = outputs_and_gradients(attend("torch"), x)
    got["d_log_decay"] = got["d_log_decay"].sum(-1)
    assert_same(got, want, tolerances.FLOAT64)


@given(
    groups=st.sampled_from([1, 2, 3]),
    length=st.integers(1, 70),
    decay=st.sampled_from(DECAYS[:4]),
    backend=st.sampled_from(["reference", "torch"]),
    packed=st.booleans(),
)
def test_shared_keys_are_keys_of_every_head_that_shares_them(
    groups: int, length: int, decay: str, backend: str, packed: bool
) -> None:
    cu_seqlens = boundaries([length // 2, 0, length - length // 2]) if packed else None
    x = make(length, decay, heads=6, batch=1, sequences=3 if packed else 1)
    x["k"] = x["k"][:, :, :groups]
    got = outputs_and_gradients(attend(backend, cu_seqlens=cu_seqlens), x)
    x["k"] = x["k"][:, :, [head // (6 // groups) for head in range(6)]]
    want = outputs_and_gradients(attend(backend, cu_seqlens=cu_seqlens), x)
    want["d_k"] = want["d_k"].unflatten(2, (groups, 6 // groups)).sum(3)
    assert_same(got, want, tolerances.FLOAT64)


def test_a_step_with_shared_keys_is_the_operator_of_one_token() -> None:
    x = make(1, "head", heads=6)
    x["k"], state = x["k"][:, :, :2], x.pop("initial_state")
    want = attend("reference")(**x, initial_state=state)
    now = {name: tensor[:, 0] for name, tensor in x.items()}
    got = gated_linear_attention_step(**now, state=state)
    assert_close(got[0], want[0][:, 0], tolerances.FLOAT64)
    assert_close(got[1], want[1], tolerances.FLOAT64)


def test_decay_one_equals_no_decay() -> None:
    x = make(50, "none")
    want, _ = attend("torch")(**x)
    got, _ = attend("torch")(**x | {"log_decay": torch.zeros_like(x["q"])})
    assert_close(got, want, tolerances.FLOAT64)


def test_operator_is_linear_in_values_and_equivariant_in_heads() -> None:
    x = make(40, "channel")
    x["initial_state"] = None
    out, _ = attend("torch")(**x)
    doubled, _ = attend("torch")(**x | {"v": 2 * x["v"]})
    assert_close(doubled, 2 * out, tolerances.FLOAT64)
    swapped, _ = attend("torch")(**{name: None if t is None else t.flip(2) for name, t in x.items()})
    assert_close(swapped, out.flip(2), tolerances.FLOAT64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_accumulate_in_float32(dtype: torch.dtype) -> None:
    x = cast(make(100, "channel"), dtype)
    x["log_decay"], x["initial_state"] = x["log_decay"].float(), x["initial_state"].float()
    want = outputs_and_gradients(attend("reference"), cast(x, torch.float64))
    got = outputs_and_gradients(attend("torch"), x)
    assert (got["out"].dtype, got["state"].dtype) == (dtype, torch.float32)
    assert (got["d_q"].dtype, got["d_log_decay"].dtype) == (dtype, torch.float32)
    assert_same(got, want, tolerances.BFLOAT16)
    assert_close(got["state"], want["state"], tolerances.FLOAT32)


def test_autocast_does_not_reach_into_the_operator() -> None:
    x = make(70, "channel", dtype=torch.float32)
    want = outputs_and_gradients(attend("torch"), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = outputs_and_gradients(attend("torch"), x)
    assert_same(got, want, 0.0)


def test_tensors_may_be_strided() -> None:
    x = make(45, "channel")
    want = outputs_and_gradients(attend("torch"), x)
    strided = {name: None if t is None else t.transpose(0, 1).contiguous().transpose(0, 1) for name, t in x.items()}
    assert_same(outputs_and_gradients(attend("torch"), strided), want, 0.0)
