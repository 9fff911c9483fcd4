"""What our operators are measured beside: PyTorch, flash-linear-attention, mamba_ssm, transformers, and released forms.

Packages are imported when a workload is made; where they are not installed the row says so.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from farspan.evaluation.op_workload import Leaves, Workload, draw, of_layer, pairs

Maker = Callable[[int, int, torch.dtype, torch.device], Workload]


def sdpa(backend: str, heads: int = 16, width: int = 64) -> Maker:
    """PyTorch's causal `scaled_dot_product_attention` with the backend of that name."""

    def make(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        leaves = draw("q k v", rows, tokens, heads, width, dtype=dtype, device=device)

        def call(x: Leaves) -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                q, k, v = (x[name].transpose(1, 2) for name in "qkv")
                return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        return Workload(leaves, call, pairs(rows, tokens, heads, width), 2.5)

    return make


def contraction(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
    """Collinear attention as released: the scores Σ_d q_d · rope(q)_d · rope(t)_d of all pairs, held and masked."""
    from farspan.nn.positions import apply_rotary, rope_frequencies, rotary_table

    heads, width = 16, 64
    leaves = draw("q u v", rows, tokens, heads, width, dtype=dtype, device=device)
    positions = torch.arange(tokens, device=device).expand(rows, -1)
    cos, sin = rotary_table(positions, rope_frequencies(width, {}, tokens, tokens)[0])
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()

    def call(x: Leaves) -> Tensor:
        half = x["u"][..., : width // 2] + x["u"][..., width // 2 :]
        t = F.relu(torch.cat((half, half), dim=-1) / 2)
        query, key = x["q"] * apply_rotary(x["q"], cos, sin), apply_rotary(t, cos, sin)
        scores = torch.einsum("bthk,bshk->bhts", query, key) * width**-0.5
        weights = scores.masked_fill(~seen, torch.finfo(dtype).min).softmax(-1, dtype=torch.float32).to(dtype)
        return torch.einsum("bhts,bshk->bthk", weights, x["v"])

    return Workload(leaves, call, pairs(rows, tokens, heads, width), 2.5)


def linear(name: str) -> Maker:
    """flash-linear-attention without a decay, 16 heads of 64 × 64."""

    def make(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
        from fla.ops import linear_attn

        heads, width = 16, 64
        leaves = draw("q k v", rows, tokens, heads, width, dtype=dtype, device=device)
        operator: Callable[..., Any] = getattr(linear_attn, name)

        def call(x: Leaves) -> Tensor:
            out: Tensor = operator(x["q"], x["k"], x["v"], normalize=False)[0]
            return out

        return Workload(leaves, call, 4.0 * rows * tokens * heads * width**2)

    return make


def metala(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
    """MetaLA's released maths around `chunk_gla`: gate, key, self-augmentation and norm as PyTorch operations."""
    from fla.ops.gla import chunk_gla

    heads, width, values = 8, 64, 128
    leaves = draw("q z", rows, tokens, heads, width, dtype=dtype, device=device)
    leaves |= draw("v", rows, tokens, heads, values, dtype=dtype, device=device)
    leaves |= {"w": torch.zeros(heads, width, device=device, requires_grad=True)}

    def call(x: Leaves) -> Tensor:
        log_decay = F.logsigmoid(x["z"].float()) / 16
        k = (1 - log_decay.exp()).to(dtype)
        out = chunk_gla(x["q"], k, x["v"], log_decay)[0]
        augmentation = (x["q"] * k * x["w"]).sum(-1, keepdim=True)
        return F.layer_norm(out + torch.sigmoid(augmentation * x["v"]).to(dtype), (values,))

    return Workload(leaves, call, 4.0 * rows * tokens * heads * width * values)


def state_space_duality(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
    """SSD by the Triton kernels of mamba_ssm, chunks of 256."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    heads, values, state = 16, 64, 128
    leaves = draw("x", rows, tokens, heads, values, dtype=dtype, device=device)
    leaves |= draw("dt", rows, tokens, heads, dtype=dtype, device=device)
    leaves |= draw("b c", rows, tokens, 1, state, dtype=dtype, device=device, std=state**-0.5)
    leaves |= {
        "a": torch.linspace(-2, -0.01, heads, device=device, requires_grad=True),
        "d": torch.ones(heads, device=device, requires_grad=True),
    }

    def call(x: Leaves) -> Tensor:
        out: Tensor = mamba_chunk_scan_combined(
            x["x"], x["dt"], x["a"], x["b"], x["c"], chunk_size=256, D=x["d"], dt_softplus=True
        )
        return out

    return Workload(leaves, call, 4.0 * rows * tokens * heads * values * state)


def convolution(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
    """The causal depthwise convolution and SiLU of PyTorch, 1,024 channels."""
    channels, width = 1024, 4
    leaves = draw("x", rows, tokens, channels, dtype=dtype, device=device)
    leaves |= {"w": torch.full((channels, width), 0.25, device=device, requires_grad=True)}

    def call(x: Leaves) -> Tensor:
        weight = x["w"].to(dtype).unsqueeze(1)
        out = F.conv1d(x["x"].transpose(1, 2), weight, padding=width - 1, groups=channels)
        return F.silu(out[..., :tokens]).transpose(1, 2)

    return Workload(leaves, call, 2.0 * rows * tokens * channels * width)


def _doge() -> Any:
    from transformers import DogeConfig

    config = DogeConfig(
        hidden_size=1024, num_attention_heads=16, num_key_value_heads=8, keep_window_size=2048, intermediate_size=2048,
        num_experts=16384, num_experts_per_tok=64, is_moe=True,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return config


def doge_attention(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
    """`DogeAttention` of transformers: hidden 1024, 16 query and 8 key heads, 2,048 keys kept."""
    from transformers.models.doge.modeling_doge import DogeAttention, DogeRotaryEmbedding

    config = _doge()
    layer = DogeAttention(config, 0).to(device, dtype)
    x = draw("x", rows, tokens, config.hidden_size, dtype=dtype, device=device)
    turns = DogeRotaryEmbedding(config).to(device)(x["x"], torch.arange(tokens, device=device).expand(rows, -1))
    seen = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=device).tril()
    projections = 2.0 * sum(p.numel() for p in layer.parameters() if p.dim() == 2) * rows * tokens
    flops = projections + pairs(rows, tokens, 16, 64, min(2048, (tokens + 1) / 2))

    return of_layer(layer, x, lambda attend, y: attend(y, turns, attention_mask=seen)[0], flops)


def doge_experts(rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
    """`DogeCDMoE` of transformers: hidden 1024, 16,384 experts, 64 a token."""
    from transformers.models.doge.modeling_doge import DogeCDMoE

    config = _doge()
    layer = DogeCDMoE(config).to(device, dtype)
    x = draw("x", rows, tokens, config.hidden_size, dtype=dtype, device=device)
    dense = 3 * config.hidden_size * config.intermediate_size
    flops = 2.0 * rows * tokens * (dense + 2 * 64 * config.hidden_size)
    return of_layer(layer, x, lambda mix, y: mix(y)[0], flops)
