"""The attention-like operators on one GPU: their precision against float64, and their times with what they may be.

Precision: for outputs and every gradient, the largest error against the float64 form must be at most twice the error of
a PyTorch form of the same dtype, that is with 16-bit operands in every matrix product, float32 accumulation and softmax
statistics. Times are those of `farspan bench ops`, with the limits that we set ourselves; what is compared with a peer
is replayed in turns with it.

    python benchmarks/attention_gpu.py
"""

import sys
import zlib
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from acceptance import Row, errors_of, run
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
from ops_gpu import _Product

Call = Callable[..., Tensor]
Named = dict[str, Tensor]
CUDNN = {64: "sdpa cudnn", 128: "sdpa cudnn 128"}
ROWS = {
    "dilated": [
        Row("dilated", 1, 32768, {"both_ms": 3.2}, cold=True),
        Row("dilated", 1, 131072),
        Row("dilated_bias", 1, 32768, cold=True),
        Row("dilated", 1, 1 << 20, {"forward_ms": 24.0, "both_ms": 85.0, "extra_gib": 9.0}),
        Row("dilated_one_head", 1, 1 << 24),
    ],
    "collinear": [
        *(
            Row("collinear" if width == 64 else "collinear_128", 1, tokens, peer=CUDNN[width], slower=limit, cold=cold)
            for width in CUDNN
            for tokens, limit, cold in ((8192, 1.07, width == 64), (16384, 1.04, False), (32768, 1.04, False))
        ),
        Row("collinear", 1, 16384, peer="coca contraction", faster=20.0, leaner=100.0),
    ],
    "softmax": [
        *(Row("softmax_rope", 1, tokens, peer="sdpa cudnn", cold=tokens == 8192) for tokens in (8192, 32768)),
    ],
    "dynamic_mask": [
        Row("dynamic_mask", 1, 8192, peer="sdpa cudnn"),
        Row("dynamic_mask", 1, 32768, peer="sdpa cudnn", faster=2.2, cold=True),
        Row("dynamic_mask", 1, 131072, peer="sdpa cudnn", faster=7.0),
        *(Row("dynamic_mask_global", 1, tokens) for tokens in (32768, 131072)),
        Row("expiry", 1, 8192, {"forward_ms": 0.2}),
        Row("expiry", 1, 32768, {"forward_ms": 0.3}),
        Row("expiry", 1, 131072, {"forward_ms": 0.6}),
        Row("doge_attention", 1, 8192, {"both_ms": 3.0}, peer="hf DogeAttention", cold=True),
        Row("doge_attention", 1, 32768),
    ],
    "experts": [
        Row("cdmoe", 1, 8192, {"both_ms": 1.9, "extra_gib": 0.5}, peer="hf DogeCDMoE", cold=True),
        Row("peer", 1, 8192, cold=True),
        Row("cdmoe_million", 1, 8192, {"both_ms": 6.0}),
    ],
}


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


def reseed(*case: object) -> None:
    """What a case draws follows from its name alone, whatever is checked before it."""
    torch.manual_seed(zlib.crc32(" ".join(map(str, case)).encode()))


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def differentiate(call: Call, x: Named, weight: Tensor) -> Named:
    """The output and all gradients for a fixed weighting."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in x.items()}
    out = call(**leaves)
    out.backward(weight.to(out.dtype))
    return {"out": out.detach()} | {"d_" + name: leaf.grad for name, leaf in leaves.items()}


def precision(name: str, case: str, x: Named, exact: Call, fast: Call, rounded: Call) -> dict[str, Any]:
    """The kernels' errors and those of the same-dtype form; three runs compared."""
    torch.manual_seed(7)
    weight = torch.randn(exact(**x).shape, device="cuda").bfloat16()
    want = differentiate(exact, {key: tensor.double() for key, tensor in x.items()}, weight)
    runs = [differentiate(fast, x, weight) for _ in range(3)]
    errors, passed = errors_of(want, runs, differentiate(rounded, x, weight))
    return {"operator": name, "case": case, "errors": errors, "passed": passed}


def dilated_checks() -> list[dict[str, Any]]:
    found = []
    cases: dict[str, tuple[int, int, int, list[int], list[int], list[int], bool]] = {
        "LongNet's ratios": (2048, 12, 64, [128, 256, 512, 1024, 2048], [1, 2, 4, 6, 12], [], False),
        "ragged": (1999, 4, 48, [500, 1200, 3000], [1, 3, 7], [], False),
        "K=128, no dense pattern": (1500, 3, 128, [600, 1500], [2, 5], [], False),
        "bias": (2048, 12, 64, [128, 256, 512, 1024, 2048], [1, 2, 4, 6, 12], [], True),
        "packed": (1999, 4, 48, [500, 1200], [1, 3], [700, 701, 1500], False),
        "bias, packed, K=128": (1500, 3, 128, [600, 1500], [1, 5], [900], True),
    }
    for case, (length, heads, width, segments, dilations, inner, biased) in cases.items():
        bounds = [0, *inner, length]
        added = torch.full((heads, length, length), float("-inf"), device="cuda")
        for start, end in pairwise(bounds):
            added[:, start:end, start:end] = log_counts(end - start, heads, segments, dilations)
        places = torch.arange(length, device="cuda")
        distance = places - places[:, None] + length - 1
        options: dict[str, Any] = {"segment_lengths": segments, "dilations": dilations}
        if inner:
            options["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device="cuda")
        for dtype in (torch.bfloat16, torch.float16):
            reseed("dilated", case, dtype)
            x = {key: normal(1 if inner else 2, length, heads, width, dtype=dtype) for key in "qkv"}
            if biased:
                x["distance_bias"] = torch.randn(heads, 2 * length - 1, device="cuda")
            exact, fast = (partial(dilated_attention, **options, backend=backend) for backend in ("torch", "triton"))

            def rounded(
                q: Tensor, k: Tensor, v: Tensor, distance_bias: Tensor | None = None, added: Tensor = added
            ) -> Tensor:
                bias = 0.0 if distance_bias is None else distance_bias[:, distance]  # noqa: B023
                return rounded_attention(q, k, v, added + bias)

            found.append(precision("dilated", f"{case}, {str(dtype)[6:]}", x, exact, fast, rounded))
    return found


def collinear_checks() -> list[dict[str, Any]]:
    found = []
    for form, dtype in (("slack", torch.bfloat16), ("strict", torch.bfloat16), ("slack", torch.float16)):
        length, heads, width = 1000, 4, 64
        cos, sin = rotary(length, width, 2)
        reseed("collinear", form, dtype)
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


def dynamic_mask_checks() -> list[dict[str, Any]]:
    found = []
    cases = {
        "2 query heads a key head": (1500, 200, (4, 2, 2), 64, torch.bfloat16),
        "2 query heads a key head, float16": (1500, 200, (4, 2, 2), 64, torch.float16),
        "1 query head a key head, K=32": (1111, 333, (3, 3, 3), 32, torch.bfloat16),
        "4 query heads a key head, K=128": (1024, 100, (8, 2, 2), 128, torch.bfloat16),
        "bias per query head": (1024, 300, (4, 1, 4), 48, torch.bfloat16),
        "most keys kept": (1500, 1400, (4, 2, 2), 64, torch.bfloat16),
        "2 query heads a key head, float32": (1500, 200, (4, 2, 2), 64, torch.float32),
        "bias per query head, K=128, float32": (1024, 300, (4, 1, 4), 128, torch.float32),
        "a window": (1500, 200, (4, 2, 2), 64, torch.bfloat16),
        "a window, float32": (1500, 200, (4, 2, 2), 64, torch.float32),
        "blocks of 16": (1500, 200, (4, 2, 2), 64, torch.bfloat16),
        "the best of the whole text": (1500, 200, (4, 2, 2), 64, torch.bfloat16),
    }
    for case, (length, keep, (heads, key_heads, bias_heads), width, dtype) in cases.items():
        reseed("dynamic_mask", case)
        shape = (2, length, key_heads, width)
        x = {"q": normal(2, length, heads, width, dtype=dtype), "k": normal(*shape, dtype=dtype)}
        x |= {"v": normal(*shape, dtype=dtype), "bias": normal(2, length, bias_heads, dtype=torch.float32)}
        options: dict[str, Any] = {"keep": keep, "window": 500 if "window" in case else None}
        options["block_size"] = 16 if "blocks" in case else None
        options["select"] = "topk_global" if "whole" in case else "topk_causal"
        kept = kept_keys(x["bias"], length, Selection(**options)).repeat_interleave(heads // bias_heads, dim=1)
        exact, fast = (partial(dynamic_mask_attention, **options, backend=backend) for backend in ("torch", "triton"))

        def rounded(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kept: Tensor = kept) -> Tensor:
            added = bias.transpose(1, 2).repeat_interleave(q.shape[2] // bias.shape[2], dim=1).unsqueeze(2)
            return rounded_attention(q, k, v, added.masked_fill(~kept, float("-inf")))

        found.append(precision("dynamic_mask", case, x, exact, fast, rounded))
    return found


def experts_checks() -> list[dict[str, Any]]:
    found = []
    for dtype in (torch.bfloat16, torch.float16):
        reseed("experts", dtype)
        x = {"x": normal(1000, 512, dtype=dtype), "weights": normal(1000, 64, dtype=dtype)}
        x |= {key: normal(4096, 512, dtype=dtype) * 512**-0.5 for key in ("down", "up")}
        ids = torch.randint(4096, (1000, 64), device="cuda")

        def call(backend: str, ids: Tensor = ids, **tensors: Tensor) -> Tensor:
            return retrieved_experts(expert_ids=ids, backend=backend, **tensors)

        exact, fast, rounded = (partial(call, backend) for backend in ("reference", "triton", "torch"))
        found.append(precision("experts", str(dtype)[6:], x, exact, fast, rounded))
    return found


CHECKS = {
    "dilated": dilated_checks,
    "collinear": collinear_checks,
    "dynamic_mask": dynamic_mask_checks,
    "experts": experts_checks,
}


if __name__ == "__main__":
    sys.exit(run("docs/results/attention_gpu.json", __doc__, CHECKS, ROWS))
