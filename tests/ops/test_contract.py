"""What operators refuse, in which words; which backend serves; the helpers for packed documents."""

import ast
import contextlib
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import farspan.ops
from farspan.errors import BackendUnavailable, ConfigError, ShapeError, nearest
from farspan.ops import (
    _backend,
    availability,
    gated_linear_attention,
    metala_attention,
    short_convolution,
    varlen,
)
from tests.ops.checks import boundaries

Q, V = torch.zeros(2, 6, 3, 4), torch.zeros(2, 6, 3, 5)
ONE = torch.zeros(1, 6, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((Q, Q[:, :5], V), {}, r"k has shape \[2, 5, 3, 4\]; expected \[B, T, G, K\] with B=2 \(from q\), T=6"),
        ((Q, Q, V[0]), {}, r"v has shape \[6, 3, 5\]; expected \[B, T, H, V\] with B=2"),
        ((Q, Q[:, :, :2], V), {}, r"H=3 query heads cannot share G=2 key heads evenly"),
        ((Q.long(), Q, V), {}, r"q is torch.int64; give a floating-point tensor \[B, T, H, K\]"),
        ((Q, Q, V, Q[..., :3]), {}, r"log_decay has shape \[2, 6, 3, 3\]; expected \[B, T, H, K\] .*K=4 \(from q\)"),
        ((Q, Q, V, Q[0, 0]), {}, r"log_decay has shape \[3, 4\]; expected \[B, T, H\] or \[B, T, H, K\]"),
        ((Q, Q, V), {"initial_state": torch.zeros(2, 3, 5, 4)}, r"initial_state .* with num_seqs=2 \(from q's B\)"),
        ((Q, Q, V.to("meta")), {}, r"v is on meta, but q is on cpu"),
        ((Q, Q, V), {"cu_seqlens": boundaries([6])}, r"packed documents need batch 1, but q has B=2"),
        (
            (ONE, ONE, ONE),
            {"cu_seqlens": boundaries([2, 3])},
            r"cu_seqlens runs from 0 to 5; it must start at 0 and end at N=6",
        ),
        (
            (ONE, ONE, ONE),
            {"cu_seqlens": boundaries([4, -1, 3])},
            r"cu_seqlens falls from 4 to 3 at entry 2; it must never fall",
        ),
        (
            (ONE, ONE, ONE),
            {"cu_seqlens": boundaries([6]).long()},
            r"cu_seqlens is torch.int64 of shape \[2\]; expected int32",
        ),
    ],
)
def test_wrong_tensors_are_refused(arguments: tuple, options: dict, words: str) -> None:
    with pytest.raises(ShapeError, match="gated_linear_attention: " + words):
        gated_linear_attention(*arguments, **options)


def test_wrong_padding_masks_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"padding_mask is torch.float32; give a boolean or integer mask"):
        metala_attention(Q, Q, V, padding_mask=torch.ones(2, 6))
    with pytest.raises(ShapeError, match=r"padding_mask has shape \[6\]; expected \[B, T\] = \[2, 6\]"):
        metala_attention(Q, Q, V, padding_mask=torch.ones(6, dtype=torch.bool))


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"backend='tritn' is not known; did you mean 'triton'\? Accepted: auto"):
        gated_linear_attention(Q, Q, V, backend="tritn")


def test_unavailable_backend_says_why_and_what_works() -> None:
    with pytest.raises(BackendUnavailable, match=r"backend='triton' cannot serve here: .*; use backend='torch'"):
        gated_linear_attention(Q, Q, V, backend="triton")


def test_availability_names_a_reason_for_every_missing_backend() -> None:
    known = availability()
    assert {"gated_linear_attention", "metala_attention", "short_convolution"} <= known.keys()
    for backends in known.values():
        assert backends["reference"] is None
        assert backends["torch"] is None


def test_kernels_are_chosen_only_where_they_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "_implementations", {})
    monkeypatch.setattr(_backend, "_kernels", {})
    monkeypatch.setattr(_backend, "_limits", {})
    _backend.register("op", reference=min, torch=max, triton="builtins:sum", triton_limits=lambda tensors: "too wide")
    assert _backend.resolve("op", "auto", [Q]) is max
    assert _backend.resolve("op", "reference", [Q, None]) is min
    monkeypatch.setattr(_backend, "triton_reason", lambda op, tensors=(): None)
    assert _backend.resolve("op", "auto", [Q]) is max  # a CPU tensor
    assert _backend.resolve("op", "triton", [Q]).__wrapped__ is sum


def test_gradients_ask_once_for_what_was_kept() -> None:
    """Where activations are recomputed, `ctx.saved_tensors` can be read a single time."""
    functions = [
        (path.name, function)
        for path in Path(_backend.__file__).parent.rglob("*.py")
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef) and function.name == "backward"
    ]
    assert len(functions) >= 10
    for name, function in functions:
        asked = [
            node for node in ast.walk(function) if isinstance(node, ast.Attribute) and node.attr == "saved_tensors"
        ]
        assert len(asked) <= 1, name


@pytest.mark.slow  # a fresh interpreter
def test_importing_operators_does_not_import_triton() -> None:
    code = "import sys, farspan.ops; sys.exit('triton' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(lengths=st.lists(st.integers(0, 9), max_size=6))
def test_boundaries_and_positions_are_inverse(lengths: list[int]) -> None:
    cu_seqlens = varlen.from_lengths(torch.tensor(lengths, dtype=torch.long))
    positions = varlen.position_ids(cu_seqlens)
    assert positions.tolist() == [p for length in lengths for p in range(length)]
    assert varlen.sequence_ids(cu_seqlens).tolist() == [i for i, length in enumerate(lengths) for _ in range(length)]
    filled = [length for length in lengths if length]
    assert torch.equal(varlen.from_position_ids(positions), boundaries(filled))


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6), chunk=st.integers(1, 4), before=st.integers(0, 3))
def test_aligned_positions_start_at_whole_chunks(lengths: list[int], chunk: int, before: int) -> None:
    cu_seqlens, at, want = boundaries(lengths), 0, []
    for length in lengths:
        want += range(at + before, at + before + length)
        at += -(-(length + before) // chunk) * chunk
    assert varlen.aligned_positions(cu_seqlens, chunk, before=before).tolist() == want
    assert varlen.aligned_length(cu_seqlens, chunk, before=before) == at


def test_pack_and_unpack_are_inverse() -> None:
    lengths = torch.tensor([3, 0, 5])
    x = torch.randn(3, 5, 2) * (torch.arange(5) < lengths[:, None]).unsqueeze(-1)
    packed, cu_seqlens = varlen.pack(x, lengths)
    assert packed.shape == (1, 8, 2)
    assert torch.equal(varlen.unpack(packed, cu_seqlens), x)
    assert varlen.unpack(packed, cu_seqlens, length=7).shape == (3, 7, 2)


def test_boundaries_are_read_again_after_a_write() -> None:
    cu_seqlens = boundaries([2, 2])
    assert varlen.boundaries(cu_seqlens) == [0, 2, 4]
    cu_seqlens[1] = 3
    assert varlen.boundaries(cu_seqlens) == [0, 3, 4]


def test_kernels_that_have_to_be_named_are_not_taken_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda = True

    def plain() -> None: ...

    for part in ("_implementations", "_kernels", "_by_name"):
        monkeypatch.setattr(_backend, part, type(getattr(_backend, part))(getattr(_backend, part)))
    monkeypatch.setattr(_backend, "triton_reason", lambda *_: None)
    for name, automatic in (("proved", True), ("unproved", False)):
        _backend.register(name, reference=plain, torch=plain, triton="farspan.errors:nearest", automatic=automatic)
    assert _backend.resolve("proved", "auto", [OnGpu()]).__wrapped__ is nearest
    assert _backend.resolve("unproved", "auto", [OnGpu()]) is plain
    assert _backend.resolve("unproved", "triton", [OnGpu()]).__wrapped__ is nearest


def test_kernels_start_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []

    @contextlib.contextmanager
    def device_of(tensor: Any) -> Iterator[None]:
        events.append(tensor)
        yield
        events.append("left")

    for part in ("_implementations", "_kernels"):
        monkeypatch.setattr(_backend, part, {})
    monkeypatch.setattr(_backend, "triton_reason", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    _backend.register("op", reference=min, torch=max, triton="operator:add")
    assert _backend.resolve("op", "triton", [Q])(3, 4) == 7
    assert events == [3, "left"]


def test_no_kernel_takes_float64() -> None:
    """It would be rounded to float32 without a word."""
    importlib.import_module("farspan.training.row_sparse")
    for module in pkgutil.walk_packages(farspan.ops.__path__, "farspan.ops."):
        if module.name.rpartition(".")[2] in ("api", "step", "scores", "rotary"):
            importlib.import_module(module.name)
    given = [torch.zeros(2, 2, 2, 2, dtype=torch.float64) for _ in range(4)]
    assert len(_backend._kernels) > 20
    for op in _backend._kernels:
        assert op in _backend._limits and _backend._limits[op](given), op


def test_a_second_derivative_is_refused_where_only_what_was_saved_shows_it() -> None:
    x = torch.randn(1, 6, 3, requires_grad=True)
    out, _ = short_convolution(x, torch.ones(3, 2))
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)  # from ones, which need no gradient
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (out.sum() + gradient.square().sum()).backward()
