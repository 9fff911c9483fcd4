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
from farspan.ops import gated_linear_attention, metala_attention

Call = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]

# B, T, H, K, V of the times, and the device milliseconds that forward + backward of MetaLA may take there.
SHAPES = {(16, 2048, 8, 64, 128): 0.75, (1, 32768, 8, 64, 128): 0.80, (1, 131072, 8, 64, 128): 3.0}
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
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, dtype: torch.dtype, chunk: int
) -> tuple[Tensor, Tensor]:
    """Gated linear attention in chunks, float32 outside of the products, their operands in `dtype`."""
    scale = q.shape[-1] ** -0.5
    if log_decay is None:
        log_decay = torch.zeros_like(q, dtype=torch.float32)
    if log_decay.dim() == 3:
        log_decay = log_decay.unsqueeze(-1).expand_as(q)
    outs = []
    for start in range(0, q.shape[1], chunk):
        queries, keys, values, g = (x[:, start : start + chunk].float().transpose(1, 2) for x in (q, k, v, log_decay))
        total = g.cumsum(-2)
        last, queries = total[..., -1:, :], queries * scale
        centre = (total[..., :1, :] + last) / 2
        scores = _Product.apply(queries * (total - centre).exp(), (keys * (centre - total).exp()).mT, dtype).tril()
        out = _Product.apply(queries * total.exp(), state, dtype) + _Product.apply(scores, values, dtype)
        state = last.exp().mT * state + _Product.apply((keys * (last - total).exp()).mT, values, dtype)
        outs.append(out.transpose(1, 2))
    return torch.cat(outs, dim=1), state


def make(shape: tuple[int, ...], kind: str, dtype: torch.dtype, gates: str = "ordinary") -> dict[str, Tensor]:
    """Random inputs of MetaLA (`kind="metala"`) or of gated linear attention with a decay of the given rank."""
    batch, length, heads, width, values = shape
    generator = torch.Generator("cuda").manual_seed(length)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cuda")

    logits = 3 * randn(batch, length, heads, width)
    if gates == "extreme":
        logits = torch.where(randn(heads, width) > 0, logits - 100, logits)
    x = {"q": randn(batch, length, heads, width).to(dtype), "v": randn(batch, length, heads, values).to(dtype)}
    if kind == "metala":
        x |= {"gate_logits": logits.to(dtype), "augmentation": randn(heads, width)}
    else:
        x["k"] = randn(batch, length, heads, width).to(dtype) * width**-0.5
        if kind != "none":
            x["log_decay"] = F.logsigmoid(logits if kind == "channel" else logits[..., 0]) / 16
    x["initial_state"] = randn(batch, heads, width, values)
    return x


def operator(kind: str, backend: str) -> Call:
    """The public operator as a call on named tensors."""
    op = metala_attention if kind == "metala" else gated_linear_attention
    return lambda x: op(**x, output_final_state=True, backend=backend)


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

    return metala if kind == "metala" else gated


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
    # With few rows in a chunk the centred factorisation holds for the extreme gates too, but not in float16.
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


def measure(shape: tuple[int, ...], kind: str, target: float | None) -> dict[str, Any]:
    """Forward, and forward + backward, without states given or asked for."""
    x = make(shape, kind, torch.bfloat16)
    del x["initial_state"]
    leaves = {name: tensor.requires_grad_() for name, tensor in x.items()}
    op = metala_attention if kind == "metala" else gated_linear_attention
    gradient = torch.randn_like(leaves["v"])

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
        "eager_both_ms": timed(both), "extra_gib": peak, "first_call_s": first, "target_ms": target,
    }  # fmt: skip
    return result | {"passed": target is None or result["both_ms"] <= target}


def main() -> int:
    """Checks, measures, prints tables, writes the results; 1 if a check or a target failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results/ops_gpu.json"), help="where to write the results"
    )
    parser.add_argument("--quick", action="store_true", help="bfloat16 MetaLA alone")
    options = parser.parse_args()
    times = [measure(shape, "metala", target) for shape, target in SHAPES.items()]
    if not options.quick:
        times += [measure(shape, kind, None) for shape in SHAPES for kind in ("channel", "head", "none")]
    common, others = (2, 1000, 3, 64, 128), [(1, 77, 2, 32, 48), (1, 2500, 2, 128, 128)]
    cases = [(shape, "metala", torch.bfloat16) for shape in (common, *others)]
    if not options.quick:
        cases += [(common, "metala", dtype) for dtype in (torch.float16, torch.float32)]
        dtypes = (torch.bfloat16, torch.float16, torch.float32)
        cases += [(common, kind, dtype) for kind in ("channel", "head", "none") for dtype in dtypes]
    checks = [
        check_precision(shape, kind, dtype, gates)
        for shape, kind, dtype in cases
        for gates in (("ordinary",) if dtype == torch.float16 or kind == "none" else ("ordinary", "extreme"))
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
    columns = ("forward_ms", "both_ms", "eager_both_ms", "extra_gib", "first_call_s")
    table = Table("operator", "B, T, H, K, V", *columns, "target_ms", "")
    for t in times:
        target = "" if t["target_ms"] is None else f"{t['target_ms']:.2f}"
        numbers = (f"{t[column]:.3f}" for column in columns)
        table.add_row(t["operator"], str(t["shape"]), *numbers, target, "ok" if t["passed"] else "MISSED")
    console.print(table)
    report = {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(),
        "versions": {
            "farspan": farspan.__version__, "torch": torch.__version__, "triton": triton.__version__,
            "python": platform.python_version(),
        },
        "times": times,
        "precision": checks,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(entry["passed"] for entry in (*times, *checks)) else 1


if __name__ == "__main__":
    sys.exit(main())
