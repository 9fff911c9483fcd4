"""What `farspan bench ops` can measure: our operators at the sizes of published models, and installed peers."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Leaves = dict[str, Tensor]


@dataclass(frozen=True)
class Workload:
    """One call to measure.

    Attributes:
        leaves: the differentiable inputs.
        call: the operator on them; returns its output.
        flops: operations of the forward pass that the formula needs, 2 per multiply-add.
        backward: operations of the backward pass as a multiple of the forward's.
    """

    leaves: Leaves
    call: Callable[[Leaves], Tensor]
    flops: float
    backward: float


@dataclass(frozen=True)
class OpCase:
    """An operator, or a peer's, that can be measured.

    Attributes:
        make: rows, tokens, dtype and device → the workload.
        peer_of: the operator of ours that it stands beside; None for our own.
        needs: the package that a peer comes from.
        cuda: whether it runs on GPUs only.
    """

    make: Callable[[int, int, torch.dtype, torch.device], Workload]
    peer_of: str | None = None
    needs: str | None = None
    cuda: bool = False

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot be measured here, or None."""
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        return "it needs an NVIDIA GPU" if self.cuda and device.type != "cuda" else None


def _draw(names: str, *size: int, dtype: torch.dtype, device: torch.device, std: float = 1.0) -> Leaves:
    generator = torch.Generator(device).manual_seed(size[1])
    return {
        name: (std * torch.randn(size, generator=generator, device=device)).to(dtype).requires_grad_()
        for name in names.split()
    }


def _gated(decay: str, module: str = "farspan.ops", name: str = "gated_linear_attention") -> Callable[..., Workload]:
    """Gated linear attention, 8 heads of 64 × 128: ours or a peer with the same arguments."""

    def make(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
        heads, width, values = 8, 64, 128
        leaves = _draw("q k", rows, tokens, heads, width, dtype=dtype, device=device)
        leaves |= _draw("v", rows, tokens, heads, values, dtype=dtype, device=device)
        if decay != "none":
            size = (rows, tokens, heads, width) if decay == "channel" else (rows, tokens, heads)
            leaves |= _draw("logits", *size, dtype=dtype, device=device)
        operator = getattr(importlib.import_module(module), name)

        def call(x: Leaves) -> Tensor:
            gate = (F.logsigmoid(x["logits"].float()) / 16,) if decay != "none" else ()
            out: Tensor = operator(x["q"], x["k"], x["v"], *gate)[0]
            return out

        return Workload(leaves, call, 4.0 * rows * tokens * heads * width * values, 2.0)

    return make


def _metala(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
    from farspan.ops import metala_attention

    heads, width, values = 8, 64, 128
    leaves = _draw("q z", rows, tokens, heads, width, dtype=dtype, device=device)
    leaves |= _draw("v", rows, tokens, heads, values, dtype=dtype, device=device)
    leaves |= {"w": torch.zeros(heads, width, device=device, requires_grad=True)}
    flops = 4.0 * rows * tokens * heads * width * values
    return Workload(leaves, lambda x: metala_attention(x["q"], x["z"], x["v"], x["w"])[0], flops, 2.0)


def _cosine(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
    from farspan.ops import cosine_attention

    heads, width = 16, 64
    leaves = _draw("q k v", rows, tokens, heads, width, dtype=dtype, device=device)
    leaves |= {"p": torch.full((heads,), 0.5, device=device, requires_grad=True)}
    flops = 4.0 * rows * tokens * heads * width**2
    return Workload(leaves, lambda x: cosine_attention(x["q"], x["k"], x["v"], x["p"])[0], flops, 2.0)


def _ssd(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
    from farspan.ops import state_space_duality

    heads, values, state = 16, 64, 128
    leaves = _draw("x", rows, tokens, heads, values, dtype=dtype, device=device)
    leaves |= _draw("dt", rows, tokens, heads, dtype=dtype, device=device)
    leaves |= _draw("b c", rows, tokens, 1, state, dtype=dtype, device=device, std=state**-0.5)
    leaves |= {
        "a": torch.linspace(-2, -0.01, heads, device=device, requires_grad=True),
        "d": torch.ones(heads, device=device, requires_grad=True),
    }
    flops = 4.0 * rows * tokens * heads * values * state

    def call(x: Leaves) -> Tensor:
        return state_space_duality(x["x"], x["dt"], x["a"], x["b"], x["c"], x["d"])[0]

    return Workload(leaves, call, flops, 2.0)


def _convolution(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
    from farspan.ops import short_convolution

    channels, width = 1024, 4
    leaves = _draw("x", rows, tokens, channels, dtype=dtype, device=device)
    leaves |= {"w": torch.full((channels, width), 0.25, device=device, requires_grad=True)}
    flops = 2.0 * rows * tokens * channels * width
    return Workload(leaves, lambda x: short_convolution(x["x"], x["w"])[0], flops, 2.0)


def _pairs(rows: int, tokens: int, heads: int, width: int, keys: float | None = None) -> float:
    """Operations of causal softmax attention with so many keys per query on average; None is half of all."""
    return 4.0 * rows * tokens * heads * width * ((tokens + 1) / 2 if keys is None else keys)


def _softmax(backend: str | None) -> Callable[..., Workload]:
    """Ours (None), or PyTorch's `scaled_dot_product_attention` with the backend of that name."""

    def make(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        from farspan.ops import softmax_attention

        heads, width = 16, 64
        leaves = _draw("q k v", rows, tokens, heads, width, dtype=dtype, device=device)

        def call(x: Leaves) -> Tensor:
            if backend is None:
                return softmax_attention(x["q"], x["k"], x["v"], causal=True)
            with sdpa_kernel(getattr(SDPBackend, backend)):
                q, k, v = (x[name].transpose(1, 2) for name in "qkv")
                return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        return Workload(leaves, call, _pairs(rows, tokens, heads, width), 2.5)

    return make


def _collinear(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
    from farspan.nn.positions import rope_frequencies, rotary_table
    from farspan.ops import collinear_attention, collinear_coefficients

    heads, width = 16, 64
    leaves = _draw("q u v", rows, tokens, heads, width, dtype=dtype, device=device)
    positions = torch.arange(tokens, device=device).expand(rows, -1)
    cos, sin = rotary_table(positions, rope_frequencies(width, {}, tokens, tokens)[0])

    def call(x: Leaves) -> Tensor:
        return collinear_attention(x["q"], collinear_coefficients(x["u"]), x["v"], cos, sin)

    return Workload(leaves, call, _pairs(rows, tokens, heads, width), 2.5)


def _dilated(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
    from farspan.ops import dilated_attention

    heads, width = 12, 64
    segments, dilations = (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12)
    leaves = _draw("q k v", rows, tokens, heads, width, dtype=dtype, device=device)
    keys = sum(min(w, tokens) / r**2 for w, r in zip(segments, dilations, strict=True)) / 2

    def call(x: Leaves) -> Tensor:
        return dilated_attention(x["q"], x["k"], x["v"], segment_lengths=segments, dilations=dilations)

    return Workload(leaves, call, _pairs(rows, tokens, heads, width, keys), 2.5)


def _dynamic_mask(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
    from farspan.ops import dynamic_mask_attention

    heads, groups, width, keep = 16, 8, 64, 2048
    leaves = _draw("q", rows, tokens, heads, width, dtype=dtype, device=device)
    leaves |= _draw("k v", rows, tokens, groups, width, dtype=dtype, device=device)
    leaves |= _draw("bias", rows, tokens, groups, dtype=torch.float32, device=device)
    seen = min(keep, tokens)
    keys = (seen * (seen + 1) / 2 + (tokens - seen) * seen) / tokens

    def call(x: Leaves) -> Tensor:
        return dynamic_mask_attention(x["q"], x["k"], x["v"], x["bias"], keep=keep)

    return Workload(leaves, call, _pairs(rows, tokens, heads, width, keys), 2.5)


CASES: dict[str, OpCase] = {
    "metala": OpCase(_metala),
    "gated_linear": OpCase(_gated("channel")),
    "gated_linear_head": OpCase(_gated("head")),
    "gated_linear_none": OpCase(_gated("none")),
    "fla chunk_gla": OpCase(_gated("channel", "fla.ops.gla", "chunk_gla"), "gated_linear", "fla", True),
    "fla chunk_linear_attn": OpCase(
        _gated("none", "fla.ops.linear_attn", "chunk_linear_attn"), "gated_linear_none", "fla", True
    ),
    "cosine": OpCase(_cosine),
    "ssd": OpCase(_ssd),
    "short_convolution": OpCase(_convolution),
    "softmax": OpCase(_softmax(None)),
    "sdpa flash": OpCase(_softmax("FLASH_ATTENTION"), "softmax"),
    "sdpa cudnn": OpCase(_softmax("CUDNN_ATTENTION"), "softmax", None, True),
    "collinear": OpCase(_collinear),
    "dilated": OpCase(_dilated),
    "dynamic_mask": OpCase(_dynamic_mask),
}
"""Everything that can be measured, by name; a peer follows the operator that it stands beside."""


def chosen(names: tuple[str, ...], peers: bool) -> dict[str, OpCase]:
    """The operators called `names` (all of ours for none), and their peers.

    Raises:
        ConfigError: for an unknown name, with the nearest known one.
    """
    from farspan.errors import ConfigError, nearest

    ours = [name for name, case in CASES.items() if case.peer_of is None]
    for name in names:
        if name not in CASES:
            raise ConfigError(f"Unknown operator {name!r}: {nearest(name, CASES)}")
    wanted = names or tuple(ours)
    return {name: case for name, case in CASES.items() if name in wanted or (peers and case.peer_of in wanted)}


def moved_bytes(workload: Workload, out: Any) -> int:
    """Bytes that a forward pass has to move at least: every input read once, the output written once."""
    return sum(x.nbytes for x in (*workload.leaves.values(), out))
