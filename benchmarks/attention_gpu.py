"""Measures the attention-like operators on one GPU: first their precision against float64, then their time.

Precision: for outputs and every gradient, the largest error against the float64 form must be at most twice the error of
a PyTorch form of the same dtype, that is with 16-bit operands in every matrix product, float32 accumulation and softmax
statistics. Time: device time of CUDA-graph replays (median); cuDNN's attention is measured in the same run.

    python benchmarks/attention_gpu.py --out docs/results/attention_gpu.json
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import farspan
from farspan.mixers.dynamic_mask import DynamicMaskMixer, DynamicMaskOptions
from farspan.mixers.layout import SequenceLayout
from farspan.nn.experts.cdmoe import CDMoE, CDMoEOptions
from farspan.ops import (
    collinear_attention,
    collinear_coefficients,
    dilated_attention,
    dynamic_mask_attention,
    retrieved_experts,
)
from farspan.ops.collinear.reference import collinear_key, collinear_query
from farspan.ops.dilated.patterns import head_offsets
from farspan.ops.dynamic_mask.reference import Selection, kept_keys
from farspan.ops.dynamic_mask.triton import expiry_triton
from ops_gpu import SMALLEST_ERROR, _Product, device_time, timed

Call = Callable[..., Tensor]
Named = dict[str, Tensor]
LONGNET = {"segment_lengths": [2048, 4096, 8192, 16384, 32768], "dilations": [1, 2, 4, 6, 12]}


def rounded_attention(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
    """Softmax attention in float32, products of operands in the dtype of q; `added` `[H, T, S]` to the scores."""
    dtype, group = q.dtype, q.shape[2] // k.shape[2]
    queries, keys, values = (x.float().transpose(1, 2) for x in (q, k, v))
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    scores = _Product.apply(queries, keys.mT, dtype) * q.shape[-1] ** -0.5 + added
    empty = scores.isneginf().all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return _Product.apply(weights, values, dtype).transpose(1, 2).to(dtype)


def causal(length: int) -> Tensor:
    """0 up to the diagonal, −∞ beyond."""
    return torch.full((length, length), float("-inf"), device="cuda").triu(1)


def log_counts(length: int, heads: int, segments: list[int], dilations: list[int]) -> Tensor:
    """How many patterns show key s to query t of head h, as a logarithm, `[H, T, T]`."""
    place, counts = torch.arange(length, device="cuda"), torch.zeros(heads, length, length, device="cuda")
    for w, r in zip(segments, dilations, strict=True):
        taken = place % w % r == torch.tensor(head_offsets("mod", heads, r), device="cuda").unsqueeze(1)
        counts += (place[:, None] // w == place // w) & taken[:, :, None] & taken[:, None, :]
    return counts.tril().log()


def rotary(length: int, width: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """cos and sin `[B, T, K/2]`."""
    rates = 10000.0 ** -(torch.arange(0, width, 2, device="cuda", dtype=torch.float64) / width)
    angles = torch.arange(length, device="cuda").double()[:, None] * rates
    return angles.cos().float().expand(batch, -1, -1), angles.sin().float().expand(batch, -1, -1)


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def differentiate(call: Call, x: Named, weight: Tensor) -> Named:
    """The output and all gradients for a fixed weighting."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in x.items()}
    out = call(**leaves)
    out.backward(weight.to(out.dtype))
    return {"out": out.detach()} | {"d_" + name: leaf.grad for name, leaf in leaves.items()}


def precision(name: str, case: str, x: Named, exact: Call, fast: Call, rounded: Call) -> dict[str, Any]:
    """The kernels' errors and those of the same-dtype form, relative to the largest entry; three runs compared."""
    torch.manual_seed(7)
    weight = torch.randn(exact(**x).shape, device="cuda").bfloat16()
    want = differentiate(exact, {key: tensor.double() for key, tensor in x.items()}, weight)
    runs = [differentiate(fast, x, weight) for _ in range(3)]
    plain = differentiate(rounded, x, weight)
    errors, passed = {}, True
    for key, right in want.items():
        largest = right.abs().max().clamp(min=1e-30)
        ours, theirs = (float((y[key].double() - right).abs().max() / largest) for y in (runs[0], plain))
        spread = max(float((run[key].double() - runs[0][key].double()).abs().max() / largest) for run in runs[1:])
        errors[key] = {"kernel": ours, "same_dtype": theirs, "between_runs": spread}
        passed &= ours <= 2 * theirs + SMALLEST_ERROR and spread <= theirs
    ratio = max(e["kernel"] / max(e["same_dtype"], 1e-7) for e in errors.values())
    return {"operator": name, "case": case, "errors": errors, "worst_ratio": ratio, "passed": passed}


def measure(name: str, case: str, call: Call, x: Named, targets: dict[str, float] | None = None) -> dict[str, Any]:
    """Forward, and forward + backward: device time, eager time, memory beside the inputs."""
    leaves = {key: tensor.requires_grad_() for key, tensor in x.items()}
    with torch.no_grad():
        gradient = torch.randn_like(call(**leaves))

    def forward() -> None:
        with torch.no_grad():
            call(**leaves)

    def both() -> None:
        for leaf in leaves.values():
            leaf.grad = None
        call(**leaves).backward(gradient)

    torch.cuda.synchronize()
    begin = time.perf_counter()
    both()
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    for leaf in leaves.values():
        leaf.grad = None
    before = torch.cuda.memory_allocated() - gradient.nbytes
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    found = {"forward_ms": device_time(forward, 10), "both_ms": device_time(both, 10), "extra_gib": peak}
    result = {"operator": name, "case": case, **found, "eager_both_ms": timed(both, 5), "first_backward_s": first}
    targets = targets or {}
    result |= {"targets": targets, "passed": all(found[key] <= limit for key, limit in targets.items())}
    torch.cuda.empty_cache()
    return result


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by cuDNN alone, what the operators are compared with."""
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        group = q.shape[2] // k.shape[2]
        k, v = (x if group == 1 else x.repeat_interleave(group, dim=2) for x in (k, v))
        out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    return out.transpose(1, 2)


def dilated_checks() -> list[dict[str, Any]]:
    found = []
    cases = {
        "LongNet's ratios": (2048, 12, 64, [128, 256, 512, 1024, 2048], [1, 2, 4, 6, 12]),
        "ragged": (1999, 4, 48, [500, 1200, 3000], [1, 3, 7]),
        "K=128, no dense pattern": (1500, 3, 128, [600, 1500], [2, 5]),
    }
    for case, (length, heads, width, segments, dilations) in cases.items():
        added, patterns = log_counts(length, heads, segments, dilations), {"segment_lengths": segments}
        patterns |= {"dilations": dilations}
        for dtype in (torch.bfloat16, torch.float16):
            x = {key: normal(2, length, heads, width, dtype=dtype) for key in "qkv"}
            exact, fast = (
                lambda q, k, v, backend=backend, patterns=patterns: dilated_attention(
                    q, k, v, **patterns, backend=backend
                )
                for backend in ("torch", "triton")
            )
            rounded = lambda q, k, v, added=added: rounded_attention(q, k, v, added)  # noqa: E731
            found.append(precision("dilated", f"{case}, {str(dtype)[6:]}", x, exact, fast, rounded))
    return found


def dilated_times() -> list[dict[str, Any]]:
    found = []
    targets = {
        32768: {"both_ms": 3.2},
        131072: {},
        1 << 20: {"forward_ms": 24.0, "both_ms": 85.0, "extra_gib": 9.0},
    }
    for length, target in targets.items():
        x = {key: normal(1, length, 12, 64) for key in "qkv"}
        call = lambda q, k, v: dilated_attention(q, k, v, **LONGNET)  # noqa: E731
        found.append(measure("dilated", f"T={length}, H=12, K=64", call, x, target))
    x = {key: normal(1, 1 << 24, 1, 64) for key in "qkv"}
    found.append(measure("dilated", f"T={1 << 24}, H=1, K=64", call, x))
    return found


def collinear_checks() -> list[dict[str, Any]]:
    found = []
    for form, dtype in (("slack", torch.bfloat16), ("strict", torch.bfloat16), ("slack", torch.float16)):
        length, heads, width = 1000, 4, 64
        cos, sin = rotary(length, width, 2)
        x = {"q": normal(2, length, heads, width, dtype=dtype), "t": normal(2, length, 2, width, dtype=dtype)}
        x["v"] = normal(2, length, 2, width, dtype=dtype)

        def call(q: Tensor, t: Tensor, v: Tensor, backend: str, form: str = form) -> Tensor:
            t = collinear_coefficients(t, backend=backend)
            return collinear_attention(q, t, v, cos, sin, form=form, backend=backend)  # noqa: B023

        def rounded(q: Tensor, t: Tensor, v: Tensor, form: str = form) -> Tensor:
            t = collinear_coefficients(t, backend="torch")
            query = collinear_query(q, cos, sin, form=form, scale=1.0)  # noqa: B023
            key = collinear_key(t, cos, sin, form=form, tie="rotary")  # noqa: B023
            return rounded_attention(query, key, v, causal(length))  # noqa: B023

        exact = lambda q, t, v, call=call: call(q, t, v, "reference")  # noqa: E731
        fast = lambda q, t, v, call=call: call(q, t, v, "triton")  # noqa: E731
        found.append(precision("collinear", f"{form}, {str(dtype)[6:]}", x, exact, fast, rounded))
    return found


def collinear_times() -> list[dict[str, Any]]:
    found = []
    for width, length in ((64, 8192), (64, 16384), (64, 32768), (128, 8192), (128, 16384), (128, 32768)):
        cos, sin = rotary(length, width)
        x = {key: normal(1, length, 16, width) for key in ("q", "t", "v")}

        def call(q: Tensor, t: Tensor, v: Tensor) -> Tensor:
            return collinear_attention(q, collinear_coefficients(t), v, cos, sin)  # noqa: B023

        case = f"T={length}, H=16, K={width}"
        ours = measure("collinear", case, call, x)
        theirs = measure("cuDNN attention", case, dense, {key: normal(1, length, 16, width) for key in "qkv"})
        factor, limit = ours["both_ms"] / theirs["both_ms"], 1.07 if length == 8192 else 1.04
        ours |= {"times_cudnn": factor, "targets": {"times_cudnn": limit}, "passed": factor <= limit}
        found += [theirs, ours]
    return found


def dynamic_mask_checks() -> list[dict[str, Any]]:
    found = []
    cases = {
        "2 query heads a key head": (1500, 200, (4, 2, 2), 64, torch.bfloat16),
        "2 query heads a key head, float16": (1500, 200, (4, 2, 2), 64, torch.float16),
        "1 query head a key head, K=32": (1111, 333, (3, 3, 3), 32, torch.bfloat16),
        "4 query heads a key head, K=128": (1024, 100, (8, 2, 2), 128, torch.bfloat16),
        "bias per query head": (1024, 300, (4, 1, 4), 48, torch.bfloat16),
        "most keys kept": (1500, 1400, (4, 2, 2), 64, torch.bfloat16),
    }
    for case, (length, keep, (heads, key_heads, bias_heads), width, dtype) in cases.items():
        shape = (2, length, key_heads, width)
        x = {"q": normal(2, length, heads, width, dtype=dtype), "k": normal(*shape, dtype=dtype)}
        x |= {"v": normal(*shape, dtype=dtype), "bias": normal(2, length, bias_heads, dtype=torch.float32)}
        kept = kept_keys(x["bias"], length, Selection(keep=keep)).repeat_interleave(heads // bias_heads, dim=1)
        exact, fast = (
            lambda q, k, v, bias, keep=keep, backend=backend: dynamic_mask_attention(
                q, k, v, bias, keep=keep, backend=backend
            )
            for backend in ("torch", "triton")
        )

        def rounded(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kept: Tensor = kept) -> Tensor:
            added = bias.transpose(1, 2).repeat_interleave(q.shape[2] // bias.shape[2], dim=1).unsqueeze(2)
            return rounded_attention(q, k, v, added.masked_fill(~kept, float("-inf")))

        found.append(precision("dynamic_mask", case, x, exact, fast, rounded))
    return found


def dynamic_mask_times() -> list[dict[str, Any]]:
    found, keep = [], 2048
    for length, least, expiry_limit in ((8192, None, 0.2), (32768, 2.2, 0.3), (131072, 7.0, 0.6)):
        x = {"q": normal(1, length, 16, 64), "k": normal(1, length, 8, 64), "v": normal(1, length, 8, 64)}
        case = f"T={length}, H=16, G=8, K=64"
        theirs = measure("cuDNN attention", case, dense, x)
        x["bias"] = normal(1, length, 8, dtype=torch.float32)
        call = lambda q, k, v, bias: dynamic_mask_attention(q, k, v, bias, keep=keep)  # noqa: E731
        ours = measure("dynamic_mask", f"{case}, w={keep}", call, x)
        factor = theirs["both_ms"] / ours["both_ms"]
        ours |= {"faster_than_cudnn": factor, "passed": least is None or factor >= least}
        ours["targets"] = {} if least is None else {"faster_than_cudnn": least}
        bias = x["bias"].detach()
        spent = device_time(lambda: expiry_triton(bias, keep), 10)  # noqa: B023
        ours |= {"expiry_ms": spent, "expiry_limit_ms": expiry_limit}
        ours["passed"] &= spent <= expiry_limit
        found += [theirs, ours]
        if length == 8192:
            found.append(dynamic_mask_layer(length))
    return found


def dynamic_mask_layer(length: int) -> dict[str, Any]:
    """The whole layer of Doge, projections included."""
    shape = SimpleNamespace(
        hidden_size=1024, num_attention_heads=16, num_key_value_heads=8, head_dim=64, causal=True,
        max_position_embeddings=length, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    layer = DynamicMaskMixer(shape, DynamicMaskOptions(), 0).to("cuda", torch.bfloat16)
    torch.nn.init.normal_(layer.bias_scale, std=0.5)
    positions = torch.arange(length, device="cuda").unsqueeze(0)
    call = lambda x: layer(x, layout=SequenceLayout(positions))  # noqa: E731
    x = {"x": normal(1, length, 1024)}
    return measure("dynamic_mask layer", f"T={length}, hidden 1024, w=2048", call, x, {"both_ms": 3.0})


def experts_checks() -> list[dict[str, Any]]:
    found = []
    for dtype in (torch.bfloat16, torch.float16):
        x = {"x": normal(1000, 512, dtype=dtype), "weights": normal(1000, 64, dtype=dtype)}
        x |= {key: normal(4096, 512, dtype=dtype) * 512**-0.5 for key in ("down", "up")}
        ids = torch.randint(4096, (1000, 64), device="cuda")

        def call(backend: str, ids: Tensor = ids, **tensors: Tensor) -> Tensor:
            return retrieved_experts(expert_ids=ids, backend=backend, **tensors)

        exact, fast, rounded = (partial(call, backend) for backend in ("reference", "triton", "torch"))
        found.append(precision("experts", str(dtype)[6:], x, exact, fast, rounded))
    return found


def experts_times() -> list[dict[str, Any]]:
    found = []
    for experts, target in ((16384, {"both_ms": 1.9, "extra_gib": 0.5}), (10**6, {"both_ms": 6.0})):
        shape = SimpleNamespace(hidden_size=1024, intermediate_size=2048, hidden_act="silu", initializer_range=0.02)
        layer = CDMoE(shape, CDMoEOptions(num_experts=experts)).to("cuda", torch.bfloat16)
        call = lambda x, layer=layer: layer(x)[0]  # noqa: E731
        case = f"T=8192, hidden 1024, {experts} experts, 64 a token"
        found.append(measure("cdmoe layer", case, call, {"x": normal(1, 8192, 1024)}, target))
    return found


CHECKS = {
    "dilated": dilated_checks,
    "collinear": collinear_checks,
    "dynamic_mask": dynamic_mask_checks,
    "experts": experts_checks,
}
TIMES = {
    "dilated": dilated_times,
    "collinear": collinear_times,
    "dynamic_mask": dynamic_mask_times,
    "experts": experts_times,
}


def show(checks: list[dict[str, Any]], times: list[dict[str, Any]]) -> None:
    """Prints both tables."""
    console = Console(width=170)
    table = Table("operator", "case", "worst ratio", "kernel's largest error", "between runs", "")
    for c in checks:
        worst = max((e["kernel"], name) for name, e in c["errors"].items())
        spread = max(e["between_runs"] for e in c["errors"].values())
        row = (c["operator"], c["case"], f"{c['worst_ratio']:.2f}", f"{worst[0]:.1e} {worst[1]}", f"{spread:.1e}")
        table.add_row(*row, "ok" if c["passed"] else "OFF")
    console.print(table)
    columns = ("forward_ms", "both_ms", "eager_both_ms", "extra_gib", "first_backward_s")
    table = Table("operator", "case", *columns, "targets", "")
    for t in times:
        aims = ", ".join(f"{key} {limit:g}" for key, limit in t["targets"].items())
        aims += f" ({t['times_cudnn']:.3f} × cuDNN)" if "times_cudnn" in t else ""
        if "expiry_ms" in t:
            aims += f" ({t['faster_than_cudnn']:.2f}), expiry {t['expiry_ms']:.3f} of {t['expiry_limit_ms']}"
        numbers = (f"{t[column]:.3f}" for column in columns)
        table.add_row(t["operator"], t["case"], *numbers, aims, "ok" if t["passed"] else "MISSED")
    console.print(table)


def main() -> int:
    """Checks, measures, prints tables, writes the results; 1 if a check or a target failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results/attention_gpu.json"), help="where to write the results"
    )
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS), help="these operators alone")
    options = parser.parse_args()
    checks = [entry for name in options.only for entry in CHECKS[name]()]
    times = [entry for name in options.only for entry in TIMES[name]()]
    show(checks, times)
    report = {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(),
        "versions": {
            "farspan": farspan.__version__, "torch": torch.__version__, "triton": triton.__version__,
            "python": platform.python_version(), "cudnn": torch.backends.cudnn.version(),
        },
        "times": times,
        "precision": checks,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(entry["passed"] for entry in (*times, *checks)) else 1


if __name__ == "__main__":
    sys.exit(main())
