"""The state-based operators on one GPU: their precision against float64, and their times with what they may be.

Precision: for outputs and every gradient, the largest error against the float64 form must be at most twice the error of
a PyTorch form of the same dtype, that is with 16-bit operands in every matrix product, float32 accumulation, states and
statistics. Times are those of `farspan bench ops`, with the limits that we set ourselves; `--only fla_gla` and the
other groups of peers measure flash-linear-attention and mamba_ssm, whose first calls take minutes.

    python benchmarks/ops_gpu.py
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from acceptance import CUDA, Row, errors_of, run
from farspan.ops import cosine_attention, gated_linear_attention, metala_attention, state_space_duality

Call = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]

# Inputs that all sequences share, and the boundaries of packed ones.
SHARED = {"augmentation", "exponent", "a", "d", "dt_bias"}
PACKED = (0, 63, 64, 300, 1000)

OPERATORS = {"metala": metala_attention, "cosine": cosine_attention, "ssd": state_space_duality}
ROWS = {
    "metala": [
        Row("metala", 16, 2048, {"both_ms": 0.75, "extra_gib": 0.35}, cold=True),
        Row("metala", 1, 32768, {"both_ms": 0.80}),
        Row("metala", 1, 131072, {"both_ms": 3.0}),
    ],
    "gated_linear": [
        Row("gated_linear", 16, 2048, {"both_ms": 0.80}, cold=True),
        Row("gated_linear", 1, 32768, {"both_ms": 0.85}),
        Row("gated_linear", 1, 131072, {"both_ms": 3.2}),
        *(Row(f"gated_linear_{decay}", 16, 2048, cold=True) for decay in ("head", "none")),
        *(Row(f"gated_linear_{decay}", 1, 32768) for decay in ("head", "none")),
    ],
    "cosine": [
        Row("cosine", 16, 2048, {"forward_ms": 0.10, "both_ms": 0.42}, cold=True),
        Row("cosine", 1, 32768, {"forward_ms": 0.15, "both_ms": 0.50}),
        Row("cosine", 1, 131072),
    ],
    "ssd": [
        Row("ssd", 16, 2048, {"both_ms": 0.90}, cold=True),
        Row("ssd", 1, 32768, {"both_ms": 0.90}),
        Row("ssd", 1, 131072, {"both_ms": 3.3}),
    ],
    "short_convolution": [
        Row("short_convolution", 16, 2048, peer="torch conv1d", cold=True),
        Row("short_convolution", 1, 32768),
        Row("short_convolution", 1, 131072),
    ],
    **{
        group: [Row(peer, *shape) for peer in peers for shape in ((16, 2048), (1, 32768), (1, 131072))]
        for group, peers in {
            "fla_gla": ("fla metala", "fla chunk_gla"),
            "fla_linear": ("fla fused_linear", "fla chunk_linear"),
            "mamba_ssm": ("mamba_ssm ssd",),
        }.items()
    },
}


class _Product(torch.autograd.Function):
    """A matrix product whose operands are rounded to a dtype, forward and backward."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        a, b = a.to(dtype).float(), b.to(dtype).float()
        ctx.save_for_backward(a, b)
        ctx.dtype = dtype
        return a @ b

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        gradient = gradients[0].to(ctx.dtype).float()
        return gradient @ b.mT, a.mT @ gradient, None


def same_dtype_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    dtype: torch.dtype,
    chunk: int,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated linear attention in chunks, float32 outside of the products, their operands in `dtype`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if log_decay is None:
        log_decay = torch.zeros_like(q, dtype=torch.float32)
    by_head = log_decay.dim() == 3
    if by_head:
        log_decay = log_decay.unsqueeze(-1).expand_as(q)
    outs = []
    for start in range(0, q.shape[1], chunk):
        queries, keys, values, g = (x[:, start : start + chunk].float().transpose(1, 2) for x in (q, k, v, log_decay))
        total = g.cumsum(-2)
        last, queries = total[..., -1:, :], queries * scale
        if by_head:  # the decays of pairs are numbers of their own, none above 1
            between = (total[..., :1] - total[..., :1].mT).tril().exp()
            scores = (_Product.apply(queries, keys.mT, dtype) * between).tril()
        else:
            centre = (total[..., :1, :] + last) / 2
            scores = _Product.apply(queries * (total - centre).exp(), (keys * (centre - total).exp()).mT, dtype).tril()
        out = _Product.apply(queries * total.exp(), state, dtype) + _Product.apply(scores, values, dtype)
        state = last.exp().mT * state + _Product.apply((keys * (last - total).exp()).mT, values, dtype)
        outs.append(out.transpose(1, 2))
    return torch.cat(outs, dim=1), state


def make(
    shape: tuple[int, ...], kind: str, dtype: torch.dtype, gates: str = "ordinary", sequences: int | None = None
) -> dict[str, Tensor]:
    """Random inputs of an operator, or of gated linear attention with a decay of the given rank."""
    batch, length, heads, width, values = shape
    sequences = batch if sequences is None else sequences
    generator = torch.Generator(CUDA).manual_seed(length)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=CUDA)

    if kind == "ssd":
        return {
            "x": randn(batch, length, heads, values).to(dtype), "dt": randn(batch, length, heads) - 2,
            "a": -torch.linspace(0.1, 4, heads, device=CUDA), "b": randn(batch, length, 1, width).to(dtype),
            "c": randn(batch, length, 1, width).to(dtype) * width**-0.5, "d": randn(heads), "dt_bias": randn(heads),
            "initial_state": randn(sequences, heads, width, values),
        }  # fmt: skip
    logits = 3 * randn(batch, length, heads, width)
    if gates == "extreme":
        logits = torch.where(randn(heads, width) > 0, logits - 100, logits)
    x = {"q": randn(batch, length, heads, width).to(dtype), "v": randn(batch, length, heads, values).to(dtype)}
    if kind == "metala":
        x |= {"gate_logits": logits.to(dtype), "augmentation": randn(heads, width)}
    else:
        x["k"] = randn(batch, length, heads, width).to(dtype) * width**-0.5
        if kind == "cosine":
            x["exponent"] = randn(heads)
        elif kind != "none":
            x["log_decay"] = F.logsigmoid(logits if kind == "channel" else logits[..., 0]) / 16
    x["initial_state"] = randn(sequences, heads, width, values)
    return x


def operator(kind: str, backend: str, bounds: Sequence[int] | None = None) -> Call:
    """The public operator as a call on named tensors, packed where `bounds` are given."""
    op = OPERATORS.get(kind, gated_linear_attention)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=CUDA)

    def call(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        past = {"initial_count": torch.full((len(x["initial_state"]),), 7, device=CUDA)} if kind == "cosine" else {}
        return op(**x, **past, cu_seqlens=cu_seqlens, output_final_state=True, backend=backend)

    return call


def rounded(kind: str, dtype: torch.dtype, chunk: int) -> Call:
    """The PyTorch form of the same dtype."""

    def gated(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        out, state = same_dtype_form(x["q"], x["k"], x["v"], x.get("log_decay"), x["initial_state"], dtype, chunk)
        return out.to(dtype), state

    def metala(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        log_decay = F.logsigmoid(x["gate_logits"].float()) / 16
        k = -torch.expm1(log_decay)
        out, state = same_dtype_form(x["q"], k, x["v"], log_decay, x["initial_state"], dtype, chunk)
        u = (x["q"].float() * k * x["augmentation"]).sum(-1, keepdim=True)
        out = F.layer_norm(out + torch.sigmoid(u * x["v"].float()), out.shape[-1:])
        return out.to(dtype), state

    def cosine(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        q, k = (F.normalize(x[name].float(), dim=-1, eps=1e-12) for name in ("q", "k"))
        count = torch.arange(8, 8 + q.shape[1], device=CUDA).log()[:, None]
        v = x["v"].float() * torch.exp(-torch.sigmoid(x["exponent"]) * count).unsqueeze(-1)
        out, state = same_dtype_form(q, k, v, None, x["initial_state"], dtype, chunk, 1.0)
        return out.to(dtype), state

    def duality(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        heads, step = x["x"].shape[2], F.softplus(x["dt"] + x["dt_bias"])
        q, k = (x[name].expand(-1, -1, heads, -1) for name in ("c", "b"))
        v = x["x"].float() * step.unsqueeze(-1)
        out, state = same_dtype_form(q, k, v, step * x["a"], x["initial_state"], dtype, chunk, 1.0)
        return (out + x["d"][:, None] * x["x"].float()).to(dtype), state

    return {"metala": metala, "cosine": cosine, "ssd": duality}.get(kind, gated)


def one_by_one(call: Call, bounds: Sequence[int]) -> Call:
    """A form without packing, sequence by sequence."""

    def part(name: str, tensor: Tensor, i: int) -> Tensor:
        if name == "initial_state":
            return tensor[i : i + 1]
        return tensor if name in SHARED else tensor[:, bounds[i] : bounds[i + 1]]

    def packed(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        count = len(bounds) - 1
        results = [call({name: part(name, tensor, i) for name, tensor in x.items()}) for i in range(count)]
        outs, states = zip(*results, strict=True)
        return torch.cat(outs, dim=1), torch.cat(states)

    return packed


def differentiate(call: Call, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients for a fixed random weighting."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in x.items()}
    out, state = call(leaves)
    generator = torch.Generator(CUDA).manual_seed(5)
    weights = [torch.randn(y.shape, generator=generator, device=CUDA).bfloat16() for y in (out, state)]
    torch.autograd.backward([out, state], [w.to(y.dtype) for w, y in zip(weights, (out, state), strict=True)])
    return {"out": out.detach(), "state": state.detach()} | {"d_" + n: leaf.grad for n, leaf in leaves.items()}


def check(
    shape: tuple[int, ...],
    kind: str,
    dtype: torch.dtype,
    gates: str = "ordinary",
    bounds: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The kernels' errors beside those of the same-dtype form."""
    x = make(shape, kind, dtype, gates, None if bounds is None else len(bounds) - 1)
    want = differentiate(operator(kind, "torch", bounds), {name: tensor.double() for name, tensor in x.items()})
    runs = [differentiate(operator(kind, "triton", bounds), x) for _ in range(3)]
    # With few rows in a chunk the centred factorisation holds for the extreme gates too, in the range of the dtype.
    chunk = 64 if gates == "ordinary" else 2 if dtype == torch.float16 else 16
    plain = rounded(kind, dtype, chunk)
    errors, passed = errors_of(want, runs, differentiate(plain if bounds is None else one_by_one(plain, bounds), x))
    packed = "" if bounds is None else f", packed {list(bounds)}"
    case = f"B, T, H, K, V = {shape}, {str(dtype)[6:]}, {gates} gates{packed}"
    return {"operator": kind, "case": case, "errors": errors, "passed": passed}


def checks(kind: str, operator_name: str) -> list[dict[str, Any]]:
    """Dtypes, odd lengths, widths, packed sequences and extreme gates of one operator."""
    # Heads enough that the largest error of a gradient per head is no matter of chance.
    usual, halves = (2, 1000, 12, 64, 128), (torch.bfloat16, torch.float16, torch.float32)
    found = [check(usual, kind, dtype) for dtype in halves]
    found += [check((2, length, 12, 64, 128), kind, torch.bfloat16) for length in (1, 63, 64, 65, 4097)]
    found += [check(shape, kind, torch.bfloat16) for shape in ((1, 77, 2, 32, 48), (1, 2500, 2, 128, 128))]
    found += [
        check((2, 65, 12, 64, 128), kind, torch.float16),
        check((1, PACKED[-1], 12, 64, 128), kind, torch.bfloat16, bounds=PACKED),
    ]
    if kind in ("metala", "channel", "head"):
        found += [check(usual, kind, dtype, "extreme") for dtype in halves]
    if kind == "metala":
        found.append(check((2, 300, 12, 64, 256), kind, torch.bfloat16))
    return [entry | {"operator": operator_name} for entry in found]


CHECKS = {
    "metala": lambda: checks("metala", "metala"),
    "gated_linear": lambda: [
        entry
        for kind, name in (("channel", "gated_linear"), ("head", "gated_linear_head"), ("none", "gated_linear_none"))
        for entry in checks(kind, name)
    ],
    "cosine": lambda: checks("cosine", "cosine"),
    "ssd": lambda: checks("ssd", "ssd"),
}


if __name__ == "__main__":
    sys.exit(run("docs/results/ops_gpu.json", __doc__, CHECKS, ROWS))
