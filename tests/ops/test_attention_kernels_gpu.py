"""The kernels of the attention-like operators on a GPU: against the formulas in float64, repeated, between others."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from farspan.ops import (
    collinear_attention,
    collinear_coefficients,
    dilated_attention,
    dynamic_mask_attention,
    retrieved_experts,
    softmax_attention,
)
from farspan.ops.dynamic_mask.expiry import expiry
from farspan.ops.rotary import rotary_pair
from tests import tolerances
from tests.ops.checks import Named, assert_same, boundaries, cast, outputs_and_gradients
from tests.ops.test_collinear import table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available"),
]
HALVES = [torch.bfloat16, torch.float16]


def results(op: Callable[..., Tensor], x: Named) -> Named:
    """The output and all gradients, on the CPU."""
    found = outputs_and_gradients(lambda **t: (op(**t).cpu(), torch.zeros(())), x)
    return {name: tensor.cpu() for name, tensor in found.items()}


def compare(op: Callable[..., Tensor], x: Named, exact: str = "torch") -> None:
    """The kernels against another form on the same numbers in float64; runs between other launches are equal."""
    want = results(lambda **t: op(backend=exact, **t), cast(x, torch.float64))
    sixteen = any(t is not None and t.element_size() == 2 for t in x.values())
    tolerance, runs = 2 * tolerances.BFLOAT16 if sixteen else tolerances.FLOAT32, []
    for _ in range(3):
        other = torch.randn(512, 512, device="cuda")
        torch.mm(other, other)
        runs.append(results(lambda **t: op(backend="triton", **t), x))
        assert_same(runs[-1], want, tolerance)
        assert_same(runs[-1], runs[0], tolerance / 4)


def normal(dtype: torch.dtype, **shapes: tuple[int, ...]) -> Named:
    return {name: torch.randn(shape, device="cuda").to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rule", ["mod", "block", "none"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "heads", "groups", "width"), [(1024, 12, 12, 64), (777, 4, 2, 24), (65, 3, 3, 128)])
def test_dilated_matches_torch(
    length: int, heads: int, groups: int, width: int, causal: bool, rule: str, dtype: torch.dtype
) -> None:
    key = (2, length, groups, width)
    x = normal(dtype, q=(2, length, heads, width), k=key, v=key)

    def op(**arguments: object) -> Tensor:
        patterns = {"segment_lengths": [128, 256, 600], "dilations": [1, 4, 12]}
        return dilated_attention(**arguments, **patterns, head_offset=rule, causal=causal)

    compare(op, x)


@pytest.mark.parametrize("detach", [False, True])
def test_dilated_with_rotations_or_detached_matches_torch(detach: bool) -> None:
    x = normal(torch.bfloat16, q=(1, 500, 4, 64), k=(1, 500, 4, 64), v=(1, 500, 4, 64))
    rates = {"frequencies": torch.rand(32, device="cuda"), "growth": torch.rand(32, device="cuda") * 1e-3}

    def op(**arguments: object) -> Tensor:
        patterns = {"segment_lengths": [100, 400], "dilations": [1, 3]}
        return dilated_attention(**arguments, **patterns, **rates, detach_mixture_weights=detach)

    compare(op, x)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("kind", ["bias", "packed", "detached", "turned", "uneven"])
def test_dilated_rows_match_torch(kind: str, width: int, causal: bool, dtype: torch.dtype) -> None:
    values = width // 2 if kind == "uneven" else width
    x = normal(dtype, q=(1, 700, 4, width), k=(1, 700, 2, width), v=(1, 700, 2, values))
    options: dict[str, object] = {"causal": causal, "head_offset": "block" if causal else "mod"}
    if kind != "packed":
        x["distance_bias"] = torch.randn(4, 1399, device="cuda")
    if kind in ("packed", "turned"):
        options["cu_seqlens"] = boundaries([250, 0, 1, 449]).cuda()
    if kind == "turned":
        options["frequencies"] = torch.rand(width // 2, device="cuda")
        options["growth"] = torch.rand(width // 2, device="cuda") * 1e-3
    options["detach_mixture_weights"] = kind == "detached"

    def op(**arguments: object) -> Tensor:
        return dilated_attention(**arguments, **options, segment_lengths=[100, 400, 650], dilations=[1, 3, 12])

    compare(op, x)
    if kind != "turned":
        first, again = (results(lambda **t: op(backend="triton", **t), x) for _ in range(2))
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("form", "tie", "rotary_dim"), [("slack", "rotary", 64), ("strict", "rotary", 32)])
@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (5, 300)])
def test_collinear_matches_reference(
    queries: int, keys: int, form: str, tie: str, rotary_dim: int, dtype: torch.dtype
) -> None:
    x = normal(dtype, q=(2, queries, 4, 64), raw=(2, keys, 2, 64), v=(2, keys, 2, 64))
    cos, sin = (y.float().cuda() for y in table(torch.arange(keys).expand(2, -1), rotary_dim))

    def op(q: Tensor, raw: Tensor, v: Tensor, backend: str) -> Tensor:
        t = collinear_coefficients(raw, rotary_dim, tie=tie, backend=backend)
        return collinear_attention(q, t, v, cos, sin, form=form, tie=tie, backend=backend)

    compare(op, x, "reference")


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "groups", "width", "rotary_dim"), [(16, 4, 64, 64), (3, 1, 40, 16), (5, 5, 128, 64)])
def test_rotation_matches_the_formula(
    heads: int, groups: int, width: int, rotary_dim: int, interleaved: bool, dtype: torch.dtype
) -> None:
    x = normal(dtype, q=(2, 333, heads, width), k=(2, 333, groups, width))
    cos, sin = (y.float().cuda() for y in table(torch.arange(333).expand(2, -1), rotary_dim))

    def op(q: Tensor, k: Tensor, backend: str = "triton") -> Tensor:
        turned = rotary_pair(q, k, cos, sin, interleaved=interleaved, backend=backend)
        return torch.cat(turned, dim=2)

    compare(op, x)
    torch.compiler.reset()
    whole = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_same(results(whole, x), results(op, x), tolerances.BFLOAT16 / 2)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(("heads", "groups", "width"), [(16, 4, 64), (3, 1, 40), (5, 5, 128)])
def test_norm_and_rotation_match_the_formula(heads: int, groups: int, width: int, dtype: torch.dtype) -> None:
    x = normal(dtype, q=(2, 333, heads, width), k=(2, 333, groups, width))
    x |= {"a": torch.rand(width, device="cuda").to(dtype), "b": torch.randn(width, device="cuda")}
    cos, sin = (y.float().cuda() for y in table(torch.arange(333).expand(2, -1), width))

    def op(q: Tensor, k: Tensor, a: Tensor, b: Tensor, backend: str = "triton") -> Tensor:
        return torch.cat(rotary_pair(q, k, cos, sin, norms=(a, b), backend=backend), dim=2)

    compare(op, x)
    torch.compiler.reset()
    whole = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_same(results(whole, x), results(op, x), tolerances.BFLOAT16 / 2)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("heads", [(4, 2, 2), (3, 3, 1), (8, 2, 2), (2, 1, 2)], ids=str)
@pytest.mark.parametrize(("queries", "keys", "width"), [(500, 500, 64), (100, 700, 32), (333, 333, 128)])
def test_dynamic_mask_matches_torch(
    queries: int, keys: int, width: int, heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    query_heads, key_heads, bias_heads = heads
    x = normal(dtype, q=(2, queries, query_heads, width), k=(2, keys, key_heads, width), v=(2, keys, key_heads, width))
    x["bias"] = torch.randn(2, keys, bias_heads, device="cuda")
    compare(partial(dynamic_mask_attention, keep=150), x)


def test_dynamic_mask_with_padding_or_packed_matches_torch() -> None:
    x = normal(torch.bfloat16, q=(1, 600, 4, 64), k=(1, 600, 2, 64), v=(1, 600, 2, 64))
    x["bias"] = torch.randn(1, 600, 2, device="cuda")
    compare(partial(dynamic_mask_attention, keep=100, key_mask=torch.rand(1, 600, device="cuda") < 0.7), x)
    compare(partial(dynamic_mask_attention, keep=100, cu_seqlens=boundaries([250, 0, 1, 349]).cuda()), x)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize(("heads", "width", "size"), [((4, 2, 1), 64, 257), ((3, 3, 3), 128, 400)])
@pytest.mark.parametrize("kind", ["window", "block_size"])
def test_dynamic_mask_of_a_window_or_of_blocks_matches_the_definition(
    kind: str, heads: tuple[int, int, int], width: int, size: int, dtype: torch.dtype
) -> None:
    query_heads, key_heads, bias_heads = heads
    key, bounds = (1, 700, key_heads, width), boundaries([250, 0, 1, 449]).cuda()
    x = normal(dtype, q=(1, 700, query_heads, width), k=key, v=key)
    x["bias"] = torch.randn(1, 700, bias_heads, device="cuda").round()
    selection = {"keep": 100, kind: size if kind == "window" else size // 30}
    compare(partial(dynamic_mask_attention, **selection), x, "reference")
    compare(partial(dynamic_mask_attention, **selection, cu_seqlens=bounds), x, "reference")


@pytest.mark.slow
def test_dynamic_mask_counts_more_elements_than_32_bits() -> None:
    """The last of so many rows is the row alone."""
    if torch.cuda.get_device_properties(0).total_memory < 80 * 2**30:
        pytest.skip("the card's memory is too small")
    x = normal(torch.bfloat16, q=(1026, 2048, 16, 64), k=(1026, 2048, 8, 64), v=(1026, 2048, 8, 64))
    x["bias"] = torch.randn(1026, 2048, 8, device="cuda")
    weight = torch.randn(2048, 16, 64, device="cuda").bfloat16()

    def last(x: Named) -> list[Tensor]:
        leaves = {name: tensor.requires_grad_() for name, tensor in x.items()}
        out = dynamic_mask_attention(**leaves, keep=512, backend="triton")
        out.backward(weight.expand_as(out))
        return [out.detach()[-1].clone(), *(tensor.grad[-1].clone() for tensor in leaves.values())]

    alone = last({name: tensor[-1:].clone() for name, tensor in x.items()})
    assert all(torch.equal(a, b) for a, b in zip(last(x), alone, strict=True))


@pytest.mark.parametrize("kind", ["random", "tied", "rising", "falling"])
def test_expiry_equals_the_torch_form(kind: str) -> None:
    from farspan.ops.dynamic_mask.triton import expiry_triton

    bias = torch.randn(2, 5000, 3, device="cuda")
    if kind == "tied":
        bias = bias.round()
    elif kind != "random":
        bias = bias + torch.arange(5000, device="cuda").reshape(1, -1, 1) * (1 if kind == "rising" else -1)
    want = expiry(bias, 700).transpose(1, 2).flatten(0, 1)
    assert torch.equal(expiry_triton(bias, 700), want)


CALLS: dict[str, Callable[..., Tensor]] = {
    "dilated": partial(dilated_attention, segment_lengths=[64, 300], dilations=[1, 4]),
    "dynamic_mask": partial(dynamic_mask_attention, keep=60),
}


@pytest.mark.parametrize("name", [*CALLS, "collinear"])
def test_compiled_call_is_one_graph(name: str) -> None:
    x = normal(torch.bfloat16, q=(1, 300, 4, 64), k=(1, 300, 4, 64), v=(1, 300, 4, 64))
    if name == "dynamic_mask":
        x["bias"] = torch.randn(1, 300, 4, device="cuda")
    cos, sin = (y.float().cuda() for y in table(torch.arange(300).expand(1, -1), 64))

    def collinear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return collinear_attention(q, collinear_coefficients(k), v, cos, sin)

    call = CALLS.get(name, collinear)
    want = results(call, x)
    assert_same(results(torch.compile(call, fullgraph=True, backend="aot_eager"), x), want, tolerances.BFLOAT16 / 2)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("experts", [40, 4096])
def test_experts_match_torch(experts: int, dtype: torch.dtype) -> None:
    x = normal(dtype, x=(300, 200), weights=(300, 24), down=(experts, 200), up=(experts, 200))
    x = {name: tensor if name == "x" else tensor * 200**-0.5 for name, tensor in x.items()}
    ids = torch.randint(experts, (300, 24), device="cuda")
    compare(partial(retrieved_experts, expert_ids=ids), x)


class _Asked(TorchDispatchMode):
    """The names of PyTorch's operators that are called below it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name().removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("op", [softmax_attention, collinear_attention])
def test_attention_is_cudnn_s_where_that_is_fastest(op: Callable[..., Tensor], width: int) -> None:
    if torch.cuda.get_device_capability() not in ((9, 0), (10, 0)):
        pytest.skip("PyTorch asks cuDNN first on cards of compute capability 9.0 and 10.0 alone")
    key = {"k": (1, 1024, 4, width)} if op is softmax_attention else {"t": (1, 1024, 4, width // 2)}
    x = normal(torch.bfloat16, q=(1, 1024, 4, width), v=(1, 1024, 4, width), **key)
    turns = table(torch.arange(1024).unsqueeze(0), width) if op is collinear_attention else ()
    leaves = {name: tensor.requires_grad_() for name, tensor in x.items()}
    leaves |= {name: turn.float().cuda() for name, turn in zip(("cos", "sin"), turns, strict=False)}
    with _Asked() as asked:
        op(**leaves).sum().backward()
    attention = {name for name in asked.names if name.startswith("_scaled_dot_product")}
    assert attention == {"_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("op", [softmax_attention, dilated_attention, dynamic_mask_attention])
def test_compiled_documents_are_one_graph(op: Callable[..., Tensor], biased: bool) -> None:
    x = normal(torch.bfloat16, **dict.fromkeys("qkv", (1, 1000, 4, 64)))
    options: dict[str, Any] = {"cu_seqlens": boundaries([300, 0, 1, 699]).cuda()}
    if op is softmax_attention:
        options["window"] = 100 if biased else None
    elif op is dilated_attention:
        options |= {"segment_lengths": [128, 512], "dilations": [1, 3]}
        if biased:
            x["distance_bias"] = torch.randn(4, 1023, device="cuda")
    else:
        options |= {"keep": 100, "select": "topk_global" if biased else "topk_causal"}
        x["bias"] = torch.randn(1, 1000, 4, device="cuda")
    call = partial(op, **options)
    torch.compiler.reset()
    whole = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(results(whole, x), results(call, x), tolerances.BFLOAT16 / 2)
