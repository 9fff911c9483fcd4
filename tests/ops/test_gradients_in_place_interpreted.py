"""The gradients that take the room of what the node of gated linear attention keeps, as autograd's rules want them."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from farspan.ops.gated_linear import launches
from farspan.ops.gated_linear import triton as gated_linear_triton
from farspan.ops.gated_linear.launches import Form

Call = Callable[..., Tensor]


def metala(q: Tensor, gate: Tensor, v: Tensor, normalize: bool = True) -> Tensor:
    form = Form(0.5, from_logits=True, normalizer=16.0, normalize=normalize)
    return gated_linear_triton.attend(q, None, v, gate, torch.ones(1, 6), None, None, form)[0]


def gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    decay = -torch.linspace(0, 1, q.numel()).view_as(q)
    return gated_linear_triton.attend(q, k, v, decay, None, None, None, Form(0.5))[0]


@pytest.fixture(params=[metala, gated])
def call(request: pytest.FixtureRequest) -> Iterator[Call]:
    yield request.param


def make(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 20, 1, width, generator=generator).to(dtype).requires_grad_() for width in (6, 6, 7)]


def gradients(out: Tensor, inputs: list[Tensor], **options: bool) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, out.numel()).sin().view_as(out)
    return torch.autograd.grad((out * weights).sum(), inputs, **options)


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gradients_take_the_room_of_what_was_kept(call: Call) -> None:
    kept = []
    inputs = make()
    with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = call(*inputs)
    places = {x.data_ptr() for x in kept}
    taken = [g.data_ptr() in places for g in gradients(out, inputs)]
    assert taken == [True, True, False]


def test_every_backward_of_a_node_gives_the_same(call: Call) -> None:
    inputs = make()
    out, want = call(*inputs), gradients(call(*inputs), inputs)
    want = tuple(x.clone() for x in want)
    handed_out = []
    for _ in range(3):
        handed_out.append(gradients(out, inputs, retain_graph=True))
        assert same(handed_out[-1], want)
        for x in handed_out[-1]:
            x.mul_(2)
    assert all(same(found, tuple(2 * x for x in want)) for found in handed_out)


def test_a_vectorised_backward_before_and_after_an_ordinary_one(call: Call) -> None:
    inputs = make()
    out = call(*inputs)
    weights = torch.randn(2, *out.shape)
    want = [torch.autograd.grad(call(*inputs), inputs, w) for w in weights]
    for _ in range(2):
        got = torch.autograd.grad(out, inputs, weights, is_grads_batched=True, retain_graph=True)
        assert same(got, tuple(torch.stack(pair) for pair in zip(*want, strict=True)))
        torch.autograd.grad(out, inputs, weights[0], retain_graph=True)


def test_checkpoints_and_tensors_kept_elsewhere(call: Call) -> None:
    inputs = make()
    want = gradients(call(*inputs), inputs)
    again = checkpoint(call, *inputs, use_reentrant=False)
    assert all(same(gradients(again, inputs, retain_graph=True), want) for _ in range(2))
    assert same(gradients(checkpoint(call, *inputs, use_reentrant=False), inputs), want)
    with save_on_cpu():
        out = call(*inputs)
    assert all(same(gradients(out, inputs, retain_graph=True), want) for _ in range(2))


@pytest.mark.parametrize("chosen", [[0], [1], [2], [0, 2]])
def test_some_inputs_without_gradient(call: Call, chosen: list[int]) -> None:
    inputs = make()
    want = gradients(call(*inputs), inputs)
    some = [x.detach().requires_grad_(i in chosen) for i, x in enumerate(inputs)]
    got = gradients(call(*some), [some[i] for i in chosen])
    assert same(got, tuple(want[i] for i in chosen))


@pytest.mark.parametrize("normalize", [True, False])
def test_the_gradient_that_is_given_is_not_written(normalize: bool) -> None:
    inputs = make()
    out = metala(*inputs, normalize=normalize)
    given = torch.randn_like(out)
    kept = given.clone(), out.clone()
    torch.autograd.grad(out, inputs, given)
    assert same((given, out), kept)


def test_a_gradient_of_another_dtype_has_room_of_its_own() -> None:
    inputs = make(torch.float16)
    want = gradients(metala(*inputs), inputs)
    inputs[1] = inputs[1].detach().float().requires_grad_()
    got = gradients(metala(*inputs), inputs)
    assert [x.dtype for x in got] == [torch.float16, torch.float32, torch.float16]
    assert same(tuple(x.half() for x in got), want)
    assert not torch.equal(got[1], want[1].float())  # nothing of it was rounded


@pytest.mark.parametrize(("batch", "length"), [(3, 70), (6, 70), (2, 140)])
def test_halves_of_a_batch_change_no_gradient(batch: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, gate, v, weight, start = (
        torch.randn(shape, generator=generator).requires_grad_()
        for shape in ((batch, length, 2, 5), (batch, length, 2, 5), (batch, length, 2, 6), (2, 5), (batch, 2, 5, 6))
    )
    leaves = [q, gate, v, weight, start]
    calls, run_backward = [], launches.run_backward
    monkeypatch.setattr(launches, "run_backward", lambda *x: calls.append(len(x[2])) or run_backward(*x))

    def results() -> tuple[Tensor, ...]:
        calls.clear()
        form = Form(0.5, from_logits=True, normalizer=16.0, normalize=True)
        out, final = gated_linear_triton.attend(q, None, v, gate, weight, start, None, form)
        return torch.autograd.grad(out.square().sum() + final.sin().sum(), leaves)

    whole = results()
    assert calls == [batch]
    monkeypatch.setattr(gated_linear_triton, "HALVED", 0)
    assert same(results(), whole)
    assert calls == ([batch // 2] * 2 if batch % 2 == 0 else [batch])
