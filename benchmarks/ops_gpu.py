"""Measures the operators' kernels on one GPU: first their precision against float64, then their time.

Precision: for outputs and every gradient, the largest error against the float64 form must be at most twice the error of
a PyTorch form of the same dtype, that is with 16-bit operands in every matrix product, float32 accumulation, states and
statistics. Time: device time of CUDA-graph replays (median), with the eager time beside it.

    python benchmarks/ops_gpu.py --out docs/results/ops_gpu.json
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import farspan
from farspan.ops import cosine_attention, gated_linear_attention, metala_attention, state_space_duality

Call = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]

# B, T, H, K, V of the times, and the device milliseconds that forward, and forward + backward, may take there.
LINEAR = ((16, 2048, 8, 64, 128), (1, 32768, 8, 64, 128), (1, 131072, 8, 64, 128))
COSINE = ((16, 2048, 16, 64, 64), (1, 32768, 16, 64, 64), (1, 131072, 16, 64, 64))
DUALITY = ((16, 2048, 16, 128, 64), (1, 32768, 16, 128, 64), (1, 131072, 16, 128, 64))
NONE = (None, None)
SHAPES = {
    "metala": (LINEAR, ((None, 0.75), (None, 0.80), (None, 3.0))),
    "channel": (LINEAR, ((None, 0.80), (None, 0.85), (None, 3.2))),
    "cosine": (COSINE, ((0.10, 0.42), (0.15, 0.50), NONE)),
    "ssd": (DUALITY, ((None, 0.90), (None, 0.90), (None, 3.3))),
    "head": (LINEAR[:2], (NONE, NONE)),
    "none": (LINEAR[:2], (NONE, NONE)),
}
OPERATORS = {"metala": metala_attention, "cosine": cosine_attention, "ssd": state_space_duality}
OTHERS = ("channel", "head", "none", "cosine", "ssd")
SMALLEST_ERROR = 1e-5  # relative errors below this are rounding of float32 sums


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


def make(shape: tuple[int, ...], kind: str, dtype: torch.dtype, gates: str = "ordinary") -> dict[str, Tensor]:
    """Random inputs of an operator, or of gated linear attention with a decay of the given rank."""
    batch, length, heads, width, values = shape
    generator = torch.Generator("cuda").manual_seed(length)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cuda")

    if kind == "ssd":
        return {
            "x": randn(batch, length, heads, values).to(dtype), "dt": randn(batch, length, heads) - 2,
            "a": -torch.linspace(0.1, 4, heads, device="cuda"), "b": randn(batch, length, 1, width).to(dtype),
            "c": randn(batch, length, 1, width).to(dtype) * width**-0.5, "d": randn(heads), "dt_bias": randn(heads),
            "initial_state": randn(batch, heads, width, values),
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
    x["initial_state"] = randn(batch, heads, width, values)
    return x


def operator(kind: str, backend: str) -> Call:
    """The public operator as a call on named tensors."""
    op = OPERATORS.get(kind, gated_linear_attention)

    def call(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        past = {"initial_count": torch.full((len(x["q"]),), 7, device="cuda")} if kind == "cosine" else {}
        return op(**x, **past, output_final_state=True, backend=backend)

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
        count = torch.arange(8, 8 + q.shape[1], device="cuda").log()[:, None]
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


def differentiate(call: Call, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients for a fixed random weighting."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in x.items()}
    out, state = call(leaves)
    generator = torch.Generator("cuda").manual_seed(5)
    weights = [torch.randn(y.shape, generator=generator, device="cuda").bfloat16() for y in (out, state)]
    torch.autograd.backward([out, state], [w.to(y.dtype) for w, y in zip(weights, (out, state), strict=True)])
    return {"out": out.detach(), "state": state.detach()} | {"d_" + n: leaf.grad for n, leaf in leaves.items()}


def check_precision(shape: tuple[int, ...], kind: str, dtype: torch.dtype, gates: str) -> dict[str, Any]:
    """The kernels' errors and those of the same-dtype form, relative to the largest entry of each result."""
    x = make(shape, kind, dtype, gates)
    want = differentiate(operator(kind, "torch"), {name: tensor.double() for name, tensor in x.items()})
    got = differentiate(operator(kind, "triton"), x)
    # With few rows in a chunk the centred factorisation holds for the extreme gates too.
    plain = differentiate(rounded(kind, dtype, 64 if gates == "ordinary" else 16), x)
    errors, passed = {}, True
    for name, exact in want.items():
        largest = exact.abs().max().clamp(min=1e-30)
        ours = float((got[name].double() - exact).abs().max() / largest)
        theirs = float((plain[name].double() - exact).abs().max() / largest)
        errors[name] = {"kernel": ours, "same_dtype": theirs}
        passed &= ours <= 2 * theirs + SMALLEST_ERROR
    return {
        "operator": kind, "shape": list(shape), "dtype": str(dtype)[6:], "gates": gates, "errors": errors,
        "worst_ratio": max(e["kernel"] / max(e["same_dtype"], 1e-7) for e in errors.values()),
        "passed": passed,
    }  # fmt: skip


def device_time(step: Callable[[], object], replays: int = 20) -> float:
    """Median milliseconds of one replay of the captured step."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
    return timed(graph.replay, replays)


def timed(step: Callable[[], object], repeats: int = 20) -> float:
    """Median milliseconds of a step between device events."""
    step()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(shape: tuple[int, ...], kind: str, targets: tuple[float | None, float | None]) -> dict[str, Any]:
    """Forward, and forward + backward, without states given or asked for."""
    x = make(shape, kind, torch.bfloat16)
    del x["initial_state"]
    leaves = {name: tensor.requires_grad_() for name, tensor in x.items()}
    op = OPERATORS.get(kind, gated_linear_attention)
    gradient = torch.randn_like(leaves["x" if kind == "ssd" else "v"])

    def forward() -> None:
        with torch.no_grad():
            op(**leaves)

    def both() -> None:
        for leaf in leaves.values():
            leaf.grad = None
        op(**leaves)[0].backward(gradient)

    torch.cuda.synchronize()
    begin = time.perf_counter()
    both()
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    result = {
        "operator": kind, "shape": list(shape), "forward_ms": device_time(forward), "both_ms": device_time(both),
        "eager_both_ms": timed(both), "extra_gib": peak, "first_call_s": first, "launches": launches(both),
        "forward_target_ms": targets[0], "target_ms": targets[1],
    }  # fmt: skip
    within = (t is None or result[name] <= t for t, name in zip(targets, ("forward_ms", "both_ms"), strict=True))
    return result | {"passed": all(within)}


def launches(step: Callable[[], object]) -> int:
    """Kernels, copies and fills of one step on the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def measure_peers() -> list[dict[str, Any]]:
    """flash-linear-attention on the first shape, where it is installed; its first call times many variants."""
    try:
        from fla.ops.gla import chunk_gla
        from fla.ops.linear_attn import chunk_linear_attn
    except ImportError:
        return []
    peers = {
        "fla chunk_gla": (chunk_gla, "channel", LINEAR[0]),
        "fla chunk_linear_attn": (chunk_linear_attn, "none", COSINE[0]),
    }
    results = []
    for name, (op, kind, shape) in peers.items():
        x = make(shape, kind, torch.bfloat16)
        leaves = [x[key].requires_grad_() for key in ("q", "k", "v", "log_decay") if key in x]
        gradient = torch.randn_like(x["v"])

        def both(op: Callable[..., Any] = op, leaves: list[Tensor] = leaves, gradient: Tensor = gradient) -> None:
            for leaf in leaves:
                leaf.grad = None
            op(*leaves)[0].backward(gradient)

        begin = time.perf_counter()
        both()
        torch.cuda.synchronize()
        first = time.perf_counter() - begin
        results.append({
            "operator": name, "shape": list(shape), "both_ms": device_time(both), "eager_both_ms": timed(both),
            "first_call_s": first,
        })  # fmt: skip
    return results


def main() -> int:
    """Checks, measures, prints tables, writes the results; 1 if a check or a target failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results/ops_gpu.json"), help="where to write the results"
    )
    parser.add_argument("--quick", action="store_true", help="bfloat16 MetaLA alone")
    parser.add_argument("--peers", action="store_true", help="measure flash-linear-attention too")
    options = parser.parse_args()
    kinds = ("metala",) if options.quick else tuple(SHAPES)
    times = [
        measure(shape, kind, targets)
        for kind in kinds
        for shape, targets in zip(SHAPES[kind][0], SHAPES[kind][1], strict=True)
    ]
    peers = measure_peers() if options.peers else []
    common, others = (2, 1000, 3, 64, 128), [(1, 77, 2, 32, 48), (1, 2500, 2, 128, 128)]
    cases = [(shape, "metala", torch.bfloat16) for shape in (common, *others)]
    if not options.quick:
        cases += [(common, "metala", dtype) for dtype in (torch.float16, torch.float32)]
        dtypes = (torch.bfloat16, torch.float16, torch.float32)
        cases += [(common, kind, dtype) for kind in OTHERS for dtype in dtypes]
    checks = [
        check_precision(shape, kind, dtype, gates)
        for shape, kind, dtype in cases
        for gates in (
            ("ordinary",) if dtype == torch.float16 or kind in ("none", "cosine", "ssd") else ("ordinary", "extreme")
        )
    ]
    console = Console(width=170)
    table = Table("operator", "B, T, H, K, V", "dtype", "gates", "worst ratio", "kernel's largest error", "")
    for c in checks:
        worst = max((e["kernel"], name) for name, e in c["errors"].items())
        row = (
            c["operator"],
            str(c["shape"]),
            c["dtype"],
            c["gates"],
            f"{c['worst_ratio']:.2f}",
            f"{worst[0]:.1e} {worst[1]}",
        )
        table.add_row(*row, "ok" if c["passed"] else "OFF")
    console.print(table)
    columns = ("forward_ms", "both_ms", "eager_both_ms", "extra_gib", "first_call_s", "launches", "target_ms")
    table = Table("operator", "B, T, H, K, V", *columns, "")
    for t in (*times, *peers):
        numbers = (f"{t[column]:.3f}" if t.get(column) is not None else "" for column in columns)
        table.add_row(t["operator"], str(t["shape"]), *numbers, "ok" if t.get("passed", True) else "MISSED")
    console.print(table)
    report = {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(),
        "versions": {
            "farspan": farspan.__version__, "torch": torch.__version__, "triton": triton.__version__,
            "python": platform.python_version(),
        },
        "times": times,
        "peers": peers,
        "precision": checks,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(entry["passed"] for entry in (*times, *checks)) else 1


if __name__ == "__main__":
    sys.exit(main())
