"""The Triton kernels on a GPU: every form against the PyTorch form, packed and padded, repeated to catch races."""

from functools import partial

import pytest
import torch

from farspan.ops import _tiles, cosine_attention, gated_linear_attention, metala_attention, state_space_duality
from farspan.ops.gated_linear import launches, rows, tiles
from farspan.ops.ssd import triton as ssd_triton
from tests import tolerances
from tests.ops import test_cosine, test_gated_linear, test_metala, test_ssd
from tests.ops.checks import Named, assert_close, assert_same, boundaries, outputs_and_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available"),
]
WIDTHS = [(64, 128), (32, 48), (20, 33), (64, 32), (128, 16), (128, 128), (128, 200), (256, 64), (129, 33)]
FORMS = [
    *((torch.bfloat16, widths) for widths in WIDTHS),
    *((torch.float32, widths) for widths in (*WIDTHS[:4], WIDTHS[-1])),
    (torch.float16, WIDTHS[0]),
]
# Of rows that the norm takes whole, the widest, and wider than a program takes.
OF_ROWS = [(torch.bfloat16, (64, 256)), (torch.float16, (128, 256)), (torch.float32, (64, 200))]
LENGTHS = [1, 63, 64, 65, 1000, 4097]
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {
    torch.float32: tolerances.FLOAT32, torch.bfloat16: 2 * tolerances.BFLOAT16, torch.float16: 2 * tolerances.BFLOAT16
}  # fmt: skip


def on_gpu(tensors: Named, dtype: torch.dtype) -> Named:
    """Everything in `dtype` but states and decays, which stay in float32."""
    exact = {"log_decay", "initial_state", "augmentation", "exponent", "dt", "a", "d", "dt_bias"}
    return {
        name: None if x is None else x.to("cuda", torch.float32 if name in exact else dtype)
        for name, x in tensors.items()
    }


def double(tensors: Named) -> Named:
    return {name: None if x is None else x.double() for name, x in tensors.items()}


def compare(op: partial, x: Named, tolerance: float) -> None:
    """The kernels on `x` against the PyTorch form on the same numbers in float64."""
    got = outputs_and_gradients(lambda **t: tuple(y.cpu() for y in op(backend="triton", **t)), x)
    want = outputs_and_gradients(lambda **t: tuple(y.cpu() for y in op(backend="torch", **t)), double(x))
    got, want = ({name: tensor.cpu() for name, tensor in results.items()} for results in (got, want))
    if "q" in x and x["q"].dtype == torch.float16:
        # A gradient below float16's smallest number is what is left of q dq - k dk, and rounds as these terms do.
        limits = torch.finfo(torch.float16)
        term = float((x["q"].cpu().double() * want["d_q"]).abs().max())
        for name in [name for name, tensor in want.items() if tensor.abs().max() < limits.smallest_normal]:
            assert got.pop(name).abs().max() <= limits.eps * term + limits.smallest_normal, name
            del want[name]
    assert_same(got, want, tolerance)


@pytest.mark.parametrize(("dtype", "widths"), FORMS, ids=str)
@pytest.mark.parametrize("decay", ["none", "head", "channel", "forgetful", "extreme"])
def test_gated_linear_matches_torch(dtype: torch.dtype, decay: str, widths: tuple[int, int]) -> None:
    x = on_gpu(test_gated_linear.make(300, decay, heads=3, width=widths[0], value_width=widths[1]), dtype)
    compare(partial(gated_linear_attention, output_final_state=True), x, TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["channel", "extreme", "metala", "cosine", "ssd"])
def test_halved_chunks_and_heads_match_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 as on cards without warp-group instructions."""
    sizes = {"heads": 3, "width": 96, "value_width": 128}
    forms = {
        "metala": (metala_attention, lambda: test_metala.make(300, heads=3, width=64, value_width=128)),
        "cosine": (cosine_attention, lambda: test_cosine.make(300)),
        "ssd": (state_space_duality, lambda: test_ssd.make(300)),
    }
    op, make = forms.get(name, (gated_linear_attention, lambda: test_gated_linear.make(300, name, **sizes)))
    past = {"initial_count": torch.tensor([3, 0], device="cuda")} if name == "cosine" else {}
    for module in (launches, rows, tiles, ssd_triton):
        monkeypatch.setattr(module, "asked_family" if module is tiles else "family", lambda device: 8)
    _tiles.forget()
    try:
        compare(partial(op, output_final_state=True, **past), on_gpu(make(), torch.float32), tolerances.FLOAT32)
    finally:
        _tiles.forget()


@pytest.mark.parametrize("decay", ["head", "channel", "extreme"])
def test_sequences_of_one_segment_match_torch(decay: str) -> None:
    x = on_gpu(test_gated_linear.make(100, decay, heads=3, width=64, value_width=128), torch.bfloat16)
    compare(partial(gated_linear_attention, output_final_state=True), x, 2 * tolerances.BFLOAT16)


@pytest.mark.parametrize("lengths", [[700, 0, 1, 64, 1300, 63], [0, 0, 65]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_documents_match_torch(dtype: torch.dtype, lengths: list[int]) -> None:
    sizes = {"batch": 1, "sequences": len(lengths), "width": 64, "value_width": 128}
    packed = {"output_final_state": True, "cu_seqlens": boundaries(lengths).cuda()}
    x = on_gpu(test_gated_linear.make(sum(lengths), **sizes), dtype)
    compare(partial(gated_linear_attention, **packed), x, TOLERANCE[dtype])
    compare(
        partial(metala_attention, **packed), on_gpu(test_metala.make(sum(lengths), **sizes), dtype), TOLERANCE[dtype]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", test_metala.OPTIONS.values(), ids=test_metala.OPTIONS)
@pytest.mark.parametrize("padded", [False, True])
def test_metala_matches_torch(options: dict[str, object], padded: bool, dtype: torch.dtype) -> None:
    x = on_gpu(test_metala.make(500, width=64, value_width=128), dtype)
    mask = torch.rand(2, 500, device="cuda") < 0.7 if padded else None

    def op(**arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        out, state = metala_attention(output_final_state=True, padding_mask=mask, **arguments, **options)
        return out if mask is None else out * mask[..., None, None], state

    compare(partial(op), x, TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "widths"), [*FORMS, *OF_ROWS], ids=str)
def test_metala_of_all_widths_matches_torch(dtype: torch.dtype, widths: tuple[int, int]) -> None:
    x = on_gpu(test_metala.make(300, heads=3, width=widths[0], value_width=widths[1]), dtype)
    compare(partial(metala_attention, output_final_state=True), x, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_metala_of_odd_lengths_matches_torch(length: int, dtype: torch.dtype) -> None:
    x = on_gpu(test_metala.make(length, heads=3, width=64, value_width=128), dtype)
    compare(partial(metala_attention, output_final_state=True), x, TOLERANCE[dtype])


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_repeated_calls_agree(widths: tuple[int, int]) -> None:
    x = on_gpu(test_gated_linear.make(1100, heads=4, width=widths[0], value_width=widths[1]), torch.bfloat16)
    leaves = {name: None if t is None else t.requires_grad_() for name, t in x.items()}
    first: list[torch.Tensor] = []
    for _ in range(100):
        out, state = gated_linear_attention(**leaves, output_final_state=True, backend="triton")
        inputs = [leaf for leaf in leaves.values() if leaf is not None]
        results = [out, state, *torch.autograd.grad([out.float().sum() + state.sum()], inputs)]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_position", ["value", "query"])
@pytest.mark.parametrize("length", LENGTHS)
def test_cosine_matches_torch(length: int, norm_position: str, dtype: torch.dtype) -> None:
    x = on_gpu(test_cosine.make(length), dtype)
    count = torch.tensor([3, 0], device="cuda")
    op = partial(cosine_attention, output_final_state=True, initial_count=count, norm_position=norm_position)
    compare(op, x, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("length", LENGTHS)
def test_state_space_duality_matches_torch(length: int, groups: int, dtype: torch.dtype) -> None:
    x = on_gpu(test_ssd.make(length, groups=groups), dtype)
    x["dt"] = x["dt"] - 3  # steps of which the memory holds many
    op = partial(state_space_duality, output_final_state=True)
    if dtype == torch.bfloat16:
        # Their gradients are sums over all tokens, with either sign, of what d_dt shows one by one.
        op = partial(op, a=x.pop("a"), dt_bias=x.pop("dt_bias"))
    compare(op, x, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", test_ssd.EXTREMES.values(), ids=test_ssd.EXTREMES)
def test_state_space_duality_with_extreme_steps_and_decays(change: dict[str, float], dtype: torch.dtype) -> None:
    x = on_gpu(test_ssd.make(100, batch=1), dtype)
    x |= {name: torch.full_like(x[name], value) for name, value in change.items()}
    op = partial(state_space_duality, output_final_state=True)
    if dtype == torch.bfloat16:  # as above
        op = partial(op, a=x.pop("a"), dt_bias=x.pop("dt_bias"))
    got = outputs_and_gradients(lambda **t: tuple(y.cpu() for y in op(backend="triton", **t)), x)
    want = outputs_and_gradients(lambda **t: tuple(y.cpu() for y in op(backend="torch", **t)), double(x))
    largest = want["out"].abs().max()  # of what is forgotten, gradients are differences of the outputs' terms
    for name in want:
        assert_close(got[name].cpu(), want[name].cpu(), TOLERANCE[dtype], name, largest=largest)


def test_packed_cosine_that_looks_both_ways_is_one_graph() -> None:
    lengths = [700, 0, 1, 64, 235]
    x, bounds = on_gpu(test_cosine.make(sum(lengths), batch=1, state=False), torch.float32), boundaries(lengths).cuda()

    def op(**tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, _ = cosine_attention(**tensors, causal=False, cu_seqlens=bounds)
        return out, out[:, :1]

    got = outputs_and_gradients(lambda **t: tuple(y.cpu() for y in op(**t)), x)
    want = outputs_and_gradients(lambda **t: tuple(y.cpu() for y in op(**t)), double(x))
    got, want = ({name: tensor.cpu() for name, tensor in results.items()} for results in (got, want))
    assert_same(got, want, tolerances.FLOAT32)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(**x)[0], op(**x)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_cosine_and_duality_match_torch(dtype: torch.dtype) -> None:
    lengths = [700, 0, 1, 64, 1300, 63]
    packed = {"cu_seqlens": boundaries(lengths).cuda(), "output_final_state": True}
    x = on_gpu(test_cosine.make(sum(lengths), batch=1, sequences=len(lengths)), dtype)
    count = torch.arange(len(lengths), device="cuda")
    compare(partial(cosine_attention, initial_count=count, **packed), x, TOLERANCE[dtype])
    x = on_gpu(test_ssd.make(sum(lengths), batch=1, sequences=len(lengths)), dtype)
    x["dt"] = x["dt"] - 3
    compare(partial(state_space_duality, **packed), x, TOLERANCE[dtype])


def cases() -> dict[str, tuple[partial, Named]]:
    """An ordinary call of each operator with kernels."""
    count = torch.tensor([3, 0], device="cuda")
    made = {
        "gated_linear": (gated_linear_attention, test_gated_linear.make(700, heads=3, width=64, value_width=128)),
        "metala": (metala_attention, test_metala.make(700)),
        "cosine": (partial(cosine_attention, initial_count=count), test_cosine.make(700)),
        "duality": (state_space_duality, test_ssd.make(700, groups=1)),
    }
    return {name: (partial(op, output_final_state=True), on_gpu(x, torch.bfloat16)) for name, (op, x) in made.items()}


@pytest.mark.parametrize("name", ["metala", "cosine", "duality"])
def test_heads_of_more_key_channels_than_the_kernels_hold_match_torch(name: str) -> None:
    op, x = cases()[name]
    places = {"q": 3, "k": 3, "gate_logits": 3, "b": 3, "c": 3, "augmentation": 1, "initial_state": 2}
    for tensor, place in places.items():
        if tensor in x:
            wide = torch.cat([x[tensor]] * 50, place)
            x[tensor] = wide * torch.rand_like(wide)
    compare(op, {tensor: None if t is None else t.float() for tensor, t in x.items()}, tolerances.FLOAT32)


def results(op: partial, x: Named) -> list[torch.Tensor]:
    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in x.items()}
    out, state = op(**leaves)
    inputs = [leaf for leaf in leaves.values() if leaf is not None]
    return [out, state, *torch.autograd.grad(out.float().square().sum() + state.sum(), inputs)]


@pytest.mark.parametrize("name", ["gated_linear", "metala", "cosine", "duality"])
def test_the_compiler_sees_one_graph(name: str) -> None:
    op, x = cases()[name]
    want = results(op, x)
    got = results(torch.compile(op, fullgraph=True, backend="aot_eager"), x)
    for ours, theirs in zip(got, want, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["gated_linear", "metala"])
def test_every_backward_of_a_node_gives_the_same(name: str) -> None:
    op, x = cases()[name]
    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in x.items()}
    inputs = [leaf for leaf in leaves.values() if leaf is not None]
    out, state = op(**leaves)
    loss = (out.float() * torch.linspace(-1, 1, out.shape[-1], device="cuda")).sum() + state.sum()
    first = [gradient.clone() for gradient in torch.autograd.grad(loss, inputs, retain_graph=True)]
    for _ in range(2):
        again = torch.autograd.grad(loss, inputs, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
        for gradient in again:
            gradient.zero_()
