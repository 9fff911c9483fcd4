"""Under torch.compile every operator is traced as a whole, and gives what it gives without."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from farspan.ops import (
    collinear_attention,
    cosine_attention,
    dilated_attention,
    dynamic_mask_attention,
    gated_linear_attention,
    metala_attention,
    short_convolution,
    softmax_attention,
    state_space_duality,
)
from farspan.ops.gated_linear import torch as chunked
from tests import tolerances
from tests.ops.checks import assert_close, assert_same, boundaries, outputs_and_gradients
from tests.ops.recording import NODES, CheckedNodes

LENGTHS = [30, 0, 1, 39]
CASES = {
    "gated_linear_attention": (gated_linear_attention, ("q", "k", "v", "log_decay")),
    "gated_linear_attention without decay": (gated_linear_attention, ("q", "k", "v")),
    "metala_attention": (metala_attention, ("q", "gate_logits", "v", "augmentation")),
    "cosine_attention": (cosine_attention, ("q", "k", "v", "exponent")),
    "state_space_duality": (state_space_duality, ("x", "dt", "a", "b", "c", "d")),
    "short_convolution": (short_convolution, ("x", "weight", "bias")),
}


def make(op: Callable[..., Any], names: tuple[str, ...], batch: int, sequences: int) -> dict[str, Tensor]:
    """Random arguments of an operator by name, and an initial state."""
    length, heads, width, value_width = sum(LENGTHS), 2, 6, 5
    shapes = {
        **dict.fromkeys(("q", "k", "b", "c", "gate_logits", "log_decay"), (batch, length, heads, width)),
        **dict.fromkeys(("v", "x"), (batch, length, heads, value_width)), "dt": (batch, length, heads),
        **dict.fromkeys(("exponent", "a", "d"), (heads,)), "augmentation": (heads, width),
        "weight": (value_width, 4), "bias": (value_width,), "initial_state": (sequences, heads, width, value_width),
    }  # fmt: skip
    if op is short_convolution:
        shapes |= {"x": (batch, length, value_width), "initial_state": (sequences, value_width, 4)}
    x = {name: torch.randn(shapes[name]) for name in (*names, "initial_state")}
    return {name: -tensor.abs() if name in ("a", "log_decay") else tensor for name, tensor in x.items()}


def compiled(call: Callable[..., Any]) -> tuple[Callable[..., Any], list[list[str]]]:
    """The call compiled without graph breaks, and the names of this library's nodes in each graph made of it."""
    seen: list[list[str]] = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        nodes = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        seen.append([name for name in nodes if name.startswith("farspan")])
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    return torch.compile(call, fullgraph=True, backend=aot_autograd(fw_compiler=compiler)), seen


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_one_node_forward_and_one_backward(name: str, packed: bool) -> None:
    op, names = CASES[name]
    batch, sequences = (1, len(LENGTHS)) if packed else (2, 2)
    x = make(op, names, batch, sequences)
    options: dict[str, Any] = {"output_final_state": True, "cu_seqlens": boundaries(LENGTHS) if packed else None}
    if op is cosine_attention:
        options["initial_count"] = torch.arange(sequences)

    def call(**tensors: Tensor) -> Any:
        return op(**tensors, **options)

    run, seen = compiled(call)
    assert_same(outputs_and_gradients(run, x), outputs_and_gradients(call, x), tolerances.FLOAT32)
    assert [len(nodes) for nodes in seen] == [1, 1]


@pytest.mark.parametrize("options", [{}, {"window": 100}, {"block_size": 8}, {"select": "relu"}], ids=str)
def test_selections_among_many_keys_are_one_graph(options: dict[str, Any]) -> None:
    """Too many for the definition."""
    shapes = {"q": (1, 140, 2, 4), "k": (1, 140, 1, 4), "v": (1, 140, 1, 4), "bias": (1, 140, 1)}
    x = {name: torch.randn(shape) for name, shape in shapes.items()}
    cu_seqlens = None if "block_size" in options else boundaries([40, 0, 30, 70])

    def call(**tensors: Tensor) -> tuple[Tensor, Tensor]:
        out = dynamic_mask_attention(**tensors, keep=25, cu_seqlens=cu_seqlens, **options)
        return out, out[:, :1]

    run, seen = compiled(call)
    assert_same(outputs_and_gradients(run, x), outputs_and_gradients(call, x), tolerances.FLOAT32)
    assert len(seen) == 2 and any("dynamic_mask_thresholds" in node or "softmax" in node for node in seen[0])


def test_a_selection_is_compiled_once_for_all_lengths() -> None:
    def call(q: Tensor, bias: Tensor) -> Tensor:
        return dynamic_mask_attention(q, q, q, bias, keep=25)

    run, seen = compiled(call)
    for length in (200, 190, 150, 133):
        q, bias = torch.randn(1, length, 2, 4), torch.randn(1, length, 2)
        assert_close(run(q, bias), call(q, bias), tolerances.FLOAT32)
    assert len(seen) <= 2  # for 200 tokens, and for any number


ROTATION = {name: torch.rand(1, sum(LENGTHS), 3) for name in ("cos", "sin")}
PATTERNS: dict[str, Any] = {"segment_lengths": [8, 16], "dilations": [1, 3]}
RATES = {"frequencies": torch.rand(3), "growth": torch.rand(3) / 50}
PACKED: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "softmax_attention": (softmax_attention, {}),
    "softmax_attention in a window": (softmax_attention, {"window": 7}),
    "collinear_attention": (collinear_attention, ROTATION),
    "dilated_attention": (dilated_attention, PATTERNS),
    "dilated_attention both ways": (dilated_attention, PATTERNS | {"causal": False, "pad_mode": "zero_keys"}),
    "dilated_attention with a bias": (dilated_attention, PATTERNS | {"distance_bias": torch.randn(4, 77)}),
    "dilated_attention with rotations": (dilated_attention, PATTERNS | RATES),
}


def attended(op: Callable[..., Any]) -> dict[str, Tensor]:
    """Queries, keys or coefficients, and values of packed documents."""
    key, width = ("t", 3) if op is collinear_attention else ("k", 6)
    length = sum(LENGTHS)
    shapes = {"q": (1, length, 4, 6), key: (1, length, 2, width), "v": (1, length, 2, 6)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("case", PACKED)
def test_attention_within_documents_is_one_node_and_its_gradient(case: str) -> None:
    op, options = PACKED[case]
    fixed = {name: value for name, value in options.items() if name != "distance_bias"}
    x = attended(op) | {name: value for name, value in options.items() if name not in fixed}

    def call(**tensors: Tensor) -> tuple[Tensor, Tensor]:
        out = op(**tensors, **fixed, cu_seqlens=boundaries(LENGTHS))
        return out, out[:, :1]

    run, seen = compiled(call)
    assert_same(outputs_and_gradients(run, x), outputs_and_gradients(call, x), tolerances.FLOAT32)
    assert [len(nodes) for nodes in seen] == [1, 1]


def test_boundaries_may_vary_without_new_graphs() -> None:
    x = attended(softmax_attention)

    def call(cu_seqlens: Tensor) -> Tensor:
        return softmax_attention(**x, cu_seqlens=cu_seqlens)

    run, seen = compiled(call)
    for lengths in (LENGTHS, [0, 20, 50, 0], [70, 0, 0, 0]):
        assert_close(run(boundaries(lengths)), call(boundaries(lengths)), tolerances.FLOAT32)
    assert len(seen) == 1


@pytest.mark.parametrize("op", [softmax_attention, dilated_attention])
def test_dropout_of_a_node_and_of_its_gradient_is_the_same(op: Callable[..., Any]) -> None:
    """Outputs are linear in v, so that Σ dv·v = Σ do·o if and only if the same weights were dropped."""
    x = attended(op)
    v = x.pop("v").requires_grad_()

    def call(v: Tensor) -> Tensor:
        options = PATTERNS if op is dilated_attention else {}
        out: Tensor = op(**x, v=v, **options, dropout=0.5, cu_seqlens=boundaries(LENGTHS))
        return out

    run, _ = compiled(call)
    first, second = run(v), run(v)
    weight = torch.randn_like(first)
    (dv,) = torch.autograd.grad(first, v, weight)
    assert_close((dv * v).sum(), (first * weight).sum(), tolerances.FLOAT32)
    assert not torch.allclose(first, second)


def test_nodes_of_documents_compute_what_autocast_asks_for() -> None:
    x, cu_seqlens = attended(softmax_attention), boundaries(LENGTHS)

    def call() -> Tensor:
        return softmax_attention(**x, cu_seqlens=cu_seqlens)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = compiled(call)[0](), call()
    assert got.dtype == want.dtype == torch.bfloat16
    assert_close(got, want, tolerances.BFLOAT16)


@pytest.mark.parametrize(
    ("name", "others", "options"),
    [
        ("softmax_packed", [], (0.5, True, None, 0.0)),
        ("dilated_packed", [None, None, None], ([8, 16], [1, 3], "mod", True, 0.5, 0.0, False, False)),
    ],
)
def test_nodes_of_documents_are_registered_as_pytorch_wants_them(name: str, others: list[None], options: tuple) -> None:
    x = attended(softmax_attention)
    tensors = [*(tensor.requires_grad_(key != "k") for key, tensor in x.items()), *others]
    given, wanted = (tensors, boundaries(LENGTHS), None), [True, False, True, *(False for _ in others)]
    node, gradient_node = (getattr(torch.ops.farspan, name + part).default for part in ("", "_gradient"))
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(node, (*given, *options), test_utils=utilities)
    torch.library.opcheck(gradient_node, (torch.randn_like(x["q"]), *given, wanted, *options), test_utils=utilities)


@pytest.mark.parametrize("options", [{}, {"window": 100}, {"block_size": 8}], ids=str)
def test_nodes_of_selections_give_what_they_declare(options: dict[str, Any]) -> None:
    q, bias = (torch.randn(shape, requires_grad=True) for shape in ((1, 140, 2, 4), (1, 140, 1)))
    with CheckedNodes():
        dynamic_mask_attention(q, q, q, bias, keep=25, **options).sum().backward()
    parts = ("thresholds", "slots", "live", "live_gradient")
    assert {f"farspan::dynamic_mask_{part}" for part in parts} <= NODES


def test_packed_documents_that_look_both_ways_are_one_graph() -> None:
    x = {name: torch.randn(1, sum(LENGTHS), 2, 6) for name in ("q", "k", "v")} | {"exponent": torch.randn(2)}

    def call(**tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, _ = cosine_attention(**tensors, causal=False, cu_seqlens=boundaries(LENGTHS))
        return out, out[:, :1]

    run, _ = compiled(call)
    assert_same(outputs_and_gradients(run, x), outputs_and_gradients(call, x), tolerances.FLOAT32)


def test_lengths_may_vary_without_new_graphs() -> None:
    def call(**tensors: Tensor) -> Any:
        return gated_linear_attention(**tensors, output_final_state=True)

    run, seen = compiled(call)
    for length in (70, 69, 50, 33):
        x = {n: t if n == "initial_state" else t[:, :length] for n, t in make(call, NAMES, 2, 2).items()}
        assert_same(outputs_and_gradients(run, x), outputs_and_gradients(call, x), tolerances.FLOAT32)
    assert len(seen) <= 4  # forward and backward, once for 70 tokens and once for any number


NAMES = CASES["gated_linear_attention"][1]


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("packed", [False, True])
def test_nodes_are_registered_as_pytorch_wants_them(decay: str, packed: bool) -> None:
    x = make(gated_linear_attention, NAMES, 1 if packed else 2, len(LENGTHS) if packed else 2)
    log_decay = {"none": None, "head": x["log_decay"][..., 0], "channel": x["log_decay"]}[decay]
    cu_seqlens = boundaries(LENGTHS) if packed else None
    arguments = (x["q"], x["k"], x["v"], log_decay, x["initial_state"], cu_seqlens, 0.5)
    # What no chunk has entered is not written: it is compared as it is given to the gradient.
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(chunked.chunked_node, arguments, test_utils=utilities)
    out, final, entering = chunked.chunked_node(*arguments)
    given = (out, final, x["q"], x["k"], x["v"], log_decay, cu_seqlens, entering, 0.5)
    torch.library.opcheck(chunked.chunked_gradient_node, given, test_utils=utilities)
