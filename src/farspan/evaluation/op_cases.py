"""What `farspan bench ops` can measure: our operators at the sizes of published models, and installed peers."""

import importlib
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from farspan.evaluation import op_peers
from farspan.evaluation.op_workload import Leaves, OpCase, Workload, draw, of_layer, pairs

LINEAR = ((16, 2048), (1, 32768), (1, 131072))
ATTENTION = ((1, 8192), (1, 32768), (1, 131072))
DILATED = ((1, 32768), (1, 131072), (1, 1 << 20))
LAYER = ((1, 2048), (1, 8192))


def _gated(decay: str, module: str = "farspan.ops", name: str = "gated_linear_attention") -> Callable[..., Workload]:
    """Gated linear attention, 8 heads of 64 × 128: ours or a peer with the same arguments."""

    def make(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
        heads, width, values = 8, 64, 128
        leaves = draw("q k", rows, tokens, heads, width, dtype=dtype, device=device)
        leaves |= draw("v", rows, tokens, heads, values, dtype=dtype, device=device)
        if decay != "none":
            size = (rows, tokens, heads, width) if decay == "channel" else (rows, tokens, heads)
            logits = draw("logits", *size, dtype=torch.float32, device=device)["logits"].detach()
            leaves |= {"log_decay": (F.logsigmoid(logits) / 16).requires_grad_()}
        operator = getattr(importlib.import_module(module), name)

        def call(x: Leaves) -> Tensor:
            out: Tensor = operator(*x.values())[0]
            return out

        return Workload(leaves, call, 4.0 * rows * tokens * heads * width * values, 2.0)

    return make


def _metala(less: float = 0.0) -> Callable[..., Workload]:
    """MetaLA, 8 heads of 64 × 128; every second channel's gate logits are so much less."""

    def make(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
        from farspan.ops import metala_attention

        heads, width, values = 8, 64, 128
        leaves = draw("q z", rows, tokens, heads, width, dtype=dtype, device=device)
        leaves["z"].detach()[..., ::2] -= less
        leaves |= draw("v", rows, tokens, heads, values, dtype=dtype, device=device)
        leaves |= {"w": torch.zeros(heads, width, device=device, requires_grad=True)}
        flops = 4.0 * rows * tokens * heads * width * values
        return Workload(leaves, lambda x: metala_attention(x["q"], x["z"], x["v"], x["w"])[0], flops, 2.0)

    return make


def _cosine(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
    from farspan.ops import cosine_attention

    heads, width = 16, 64
    leaves = draw("q k v", rows, tokens, heads, width, dtype=dtype, device=device)
    leaves |= {"p": torch.full((heads,), 0.5, device=device, requires_grad=True)}
    flops = 4.0 * rows * tokens * heads * width**2
    return Workload(leaves, lambda x: cosine_attention(x["q"], x["k"], x["v"], x["p"])[0], flops, 2.0)


def _ssd(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
    from farspan.ops import state_space_duality

    heads, values, state = 16, 64, 128
    leaves = draw("x", rows, tokens, heads, values, dtype=dtype, device=device)
    leaves |= draw("dt", rows, tokens, heads, dtype=dtype, device=device)
    leaves |= draw("b c", rows, tokens, 1, state, dtype=dtype, device=device, std=state**-0.5)
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
    leaves = draw("x", rows, tokens, channels, dtype=dtype, device=device)
    leaves |= {"w": torch.full((channels, width), 0.25, device=device, requires_grad=True)}
    flops = 2.0 * rows * tokens * channels * width
    return Workload(leaves, lambda x: short_convolution(x["x"], x["w"])[0], flops, 2.0)


def _swiglu(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
    from farspan.ops.swiglu.api import swiglu

    channels = 2048
    leaves = draw("gate up", rows, tokens, channels, dtype=dtype, device=device)
    return Workload(leaves, lambda x: swiglu(x["gate"], x["up"]), 2.0 * rows * tokens * channels)


def _softmax(width: int = 64, rope: bool = False) -> Callable[[int, int, torch.dtype, torch.device], Workload]:
    """Causal softmax attention, 16 heads."""

    def make(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
        from farspan.ops import softmax_attention
        from farspan.ops.rotary import rotary_pair

        leaves = draw("q k v", rows, tokens, 16, width, dtype=dtype, device=device)
        cos, sin = _turns(rows, tokens, width, device)

        def call(x: Leaves) -> Tensor:
            q, k = rotary_pair(x["q"], x["k"], cos, sin) if rope else (x["q"], x["k"])
            return softmax_attention(q, k, x["v"], causal=True)

        return Workload(leaves, call, pairs(rows, tokens, 16, width), 2.5)

    return make


def _turns(rows: int, tokens: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    from farspan.nn.positions import rope_frequencies, rotary_table

    positions = torch.arange(tokens, device=device).expand(rows, -1)
    return rotary_table(positions, rope_frequencies(width, {}, tokens, tokens)[0])


def _collinear(width: int) -> Callable[[int, int, torch.dtype, torch.device], Workload]:
    """Collinear attention from raw coefficients, 16 heads."""

    def make(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
        from farspan.ops import collinear_attention, collinear_coefficients

        leaves = draw("q u v", rows, tokens, 16, width, dtype=dtype, device=device)
        cos, sin = _turns(rows, tokens, width, device)

        def call(x: Leaves) -> Tensor:
            return collinear_attention(x["q"], collinear_coefficients(x["u"]), x["v"], cos, sin)

        return Workload(leaves, call, pairs(rows, tokens, 16, width), 2.5)

    return make


def _dilated(heads: int, bias: bool = False) -> Callable[[int, int, torch.dtype, torch.device], Workload]:
    """LongNet's five patterns, 64 channels a head; with a learnt bias by distance if asked for."""

    def make(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
        from farspan.ops import dilated_attention

        segments, dilations = (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12)
        leaves = draw("q k v", rows, tokens, heads, 64, dtype=dtype, device=device)
        keys = sum(min(w, tokens) / r**2 for w, r in zip(segments, dilations, strict=True)) / 2
        if bias:
            reach = min(segments[-1], tokens)
            leaves |= draw("distance_bias", heads, 2 * reach - 1, dtype=torch.float32, device=device)

        def call(x: Leaves) -> Tensor:
            tensors, line = (x["q"], x["k"], x["v"]), x.get("distance_bias")
            return dilated_attention(*tensors, segment_lengths=segments, dilations=dilations, distance_bias=line)

        return Workload(leaves, call, pairs(rows, tokens, heads, 64, keys), 2.5)

    return make


def _keep(tokens: int) -> int:
    """Keys that a selection keeps: 2,048, and of short texts a quarter, so that there is something to select."""
    return min(2048, max(1, tokens // 4))


def _kept(tokens: int, keep: int) -> float:
    """Keys that a query sees on average."""
    seen = min(keep, tokens)
    return (seen * (seen + 1) / 2 + (tokens - seen) * seen) / tokens


def _dynamic_mask(
    windows: int | None = None, block_size: int | None = None, select: str = "topk_causal"
) -> Callable[[int, int, torch.dtype, torch.device], Workload]:
    """Top-w attention with a bias per key, 16 query and 8 key heads; of the last `windows` · w keys, or in blocks."""

    def make(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
        from farspan.ops import dynamic_mask_attention

        heads, groups, width, keep = 16, 8, 64, _keep(tokens)
        leaves = draw("q", rows, tokens, heads, width, dtype=dtype, device=device)
        leaves |= draw("k v", rows, tokens, groups, width, dtype=dtype, device=device)
        leaves |= draw("bias", rows, tokens, groups, dtype=torch.float32, device=device)
        window = None if windows is None else windows * keep

        def call(x: Leaves) -> Tensor:
            tensors = x["q"], x["k"], x["v"], x["bias"]
            return dynamic_mask_attention(*tensors, select=select, keep=keep, window=window, block_size=block_size)

        # Of keys chosen from the whole text a query sees half, on average.
        seen = _kept(tokens, keep) if select == "topk_causal" else keep / 2
        return Workload(leaves, call, pairs(rows, tokens, heads, width, seen), 2.5)

    return make


def _expiry(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
    """The selection of dynamic masks alone: until which query each key is kept."""
    from farspan.ops.dynamic_mask import expiry

    leaves = draw("bias", rows, tokens, 8, dtype=torch.float32, device=device)
    if device.type == "cuda":
        from farspan.ops.dynamic_mask.triton import expiry_triton as select
    else:
        select = expiry.expiry
    return Workload(leaves, lambda x: select(x["bias"].detach(), _keep(tokens)), 0.0)


def _dynamic_mask_layer(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
    """The layer of Doge with its projections: hidden 1024, 16 query and 8 key heads, 2,048 keys kept."""
    from farspan.mixers.dynamic_mask import DynamicMaskMixer, DynamicMaskOptions
    from farspan.mixers.layout import SequenceLayout

    shape = SimpleNamespace(
        hidden_size=1024, num_attention_heads=16, num_key_value_heads=8, head_dim=64, causal=True,
        max_position_embeddings=tokens, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    layer = DynamicMaskMixer(shape, DynamicMaskOptions(), 0).to(device, dtype)
    if layer.bias_scale is not None:
        torch.nn.init.normal_(layer.bias_scale, std=0.5)
    positions = torch.arange(tokens, device=device).expand(rows, -1)
    x = draw("x", rows, tokens, 1024, dtype=dtype, device=device)
    projections = 2.0 * sum(p.numel() for p in layer.parameters() if p.dim() == 2) * rows * tokens
    flops = projections + pairs(rows, tokens, 16, 64, _kept(tokens, 2048))
    return of_layer(layer, x, lambda mix, y: mix(y, layout=SequenceLayout(positions)), flops)


def _experts(experts: int) -> Callable[[int, int, torch.dtype, torch.device], Workload]:
    """The feed-forward of Doge, hidden 1024: a gated MLP beside retrieved experts, 64 a token."""

    def make(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
        from farspan.nn.experts.cdmoe import CDMoE, CDMoEOptions

        shape = SimpleNamespace(hidden_size=1024, intermediate_size=2048, hidden_act="silu", initializer_range=0.02)
        with torch.device(device):
            layer = CDMoE(shape, CDMoEOptions(num_experts=experts)).to(dtype)
        x = draw("x", rows, tokens, 1024, dtype=dtype, device=device)
        flops = 2.0 * rows * tokens * 1024 * (3 * 2048 + 2 * 64)
        return of_layer(layer, x, lambda mix, y: mix(y)[0], flops)

    return make


def _peer(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
    """PEER in hidden 1024: 16,384 retrieved experts alone, 16 for each of 8 heads."""
    from farspan.nn.experts.peer import PEER, PEEROptions

    shape = SimpleNamespace(hidden_size=1024, hidden_act="silu", initializer_range=0.02)
    with torch.device(device):
        layer = PEER(shape, PEEROptions()).to(dtype)
    x = draw("x", rows, tokens, 1024, dtype=dtype, device=device)
    return of_layer(layer, x, lambda mix, y: mix(y)[0], rows * tokens * layer.flops_per_token())


CASES: dict[str, OpCase] = {
    "metala": OpCase(_metala(), shapes=LINEAR),
    "metala_extreme": OpCase(_metala(less=100.0), shapes=LINEAR[:2]),
    "fla metala": OpCase(op_peers.metala, "metala", "fla", True),
    "gated_linear": OpCase(_gated("channel"), shapes=LINEAR),
    "fla chunk_gla": OpCase(_gated("channel", "fla.ops.gla", "chunk_gla"), "gated_linear", "fla", True),
    "gated_linear_head": OpCase(_gated("head")),
    "gated_linear_none": OpCase(_gated("none")),
    "cosine": OpCase(_cosine, shapes=LINEAR),
    "fla fused_linear": OpCase(op_peers.linear("fused_chunk_linear_attn"), "cosine", "fla", True),
    "fla chunk_linear": OpCase(op_peers.linear("chunk_linear_attn"), "cosine", "fla", True),
    "ssd": OpCase(_ssd, shapes=LINEAR),
    "mamba_ssm ssd": OpCase(op_peers.state_space_duality, "ssd", "mamba_ssm", True),
    "short_convolution": OpCase(_convolution, shapes=LINEAR),
    "torch conv1d": OpCase(op_peers.convolution, "short_convolution"),
    "swiglu": OpCase(_swiglu),
    "softmax": OpCase(_softmax(), shapes=ATTENTION),
    "softmax_rope": OpCase(_softmax(rope=True), shapes=ATTENTION[:2]),
    "sdpa flash": OpCase(op_peers.sdpa("FLASH_ATTENTION"), "softmax", shapes=ATTENTION[:2]),
    "sdpa cudnn": OpCase(op_peers.sdpa("CUDNN_ATTENTION"), "softmax", None, True, ATTENTION),
    "collinear": OpCase(_collinear(64), shapes=ATTENTION[:2]),
    "coca contraction": OpCase(op_peers.contraction, "collinear", shapes=((1, 8192), (1, 16384)), most_tokens=16384),
    "collinear_128": OpCase(_collinear(128), shapes=ATTENTION[:2]),
    "sdpa cudnn 128": OpCase(op_peers.sdpa("CUDNN_ATTENTION", width=128), "collinear_128", None, True, ATTENTION[:2]),
    "dilated": OpCase(_dilated(12), shapes=DILATED),
    "dilated_bias": OpCase(_dilated(12, bias=True), shapes=DILATED[:2]),
    "dilated_one_head": OpCase(_dilated(1), shapes=((1, 1 << 24),)),
    "dynamic_mask": OpCase(_dynamic_mask(), shapes=ATTENTION),
    "dynamic_mask_window": OpCase(_dynamic_mask(windows=2), shapes=ATTENTION),
    "dynamic_mask_blocks": OpCase(_dynamic_mask(block_size=64), shapes=ATTENTION),
    "dynamic_mask_global": OpCase(_dynamic_mask(select="topk_global"), shapes=ATTENTION),
    "expiry": OpCase(_expiry, shapes=ATTENTION),
    "doge_attention": OpCase(_dynamic_mask_layer, shapes=LAYER),
    "hf DogeAttention": OpCase(op_peers.doge_attention, "doge_attention", "transformers", False, LAYER, 8192),
    "cdmoe": OpCase(_experts(16384), shapes=LAYER),
    "hf DogeCDMoE": OpCase(op_peers.doge_experts, "cdmoe", "transformers", False, LAYER),
    "peer": OpCase(_peer, shapes=LAYER),
    "cdmoe_million": OpCase(_experts(10**6), cuda=True, shapes=LAYER[1:]),
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
