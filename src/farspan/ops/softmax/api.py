"""The public function of softmax attention: checks, choice of the backend, call."""

from torch import Tensor

from farspan.errors import ConfigError, ShapeError
from farspan.ops._backend import register, resolve
from farspan.ops._contract import Contract
from farspan.ops.softmax.reference import softmax_attention_reference
from farspan.ops.softmax.torch import softmax_attention_sdpa

register("softmax_attention", reference=softmax_attention_reference, torch=softmax_attention_sdpa)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Scaled dot-product attention, o_t = Σ_s softmax_s(scale · q_t·k_s) v_s over the keys s that query t may see.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, S, G, K]`, S ≥ T when causal; query head h reads key head h // (H/G). The last query stands at the last
            key, so that with a cache the T new queries see the S − T older keys (bottom-right alignment).
        v: `[B, S, G, V]`.
        scale: factor on the scores; None is K^−½.
        causal: whether a query sees only keys up to its own place.
        window: number of keys a query sees, itself included (in both directions when not causal); None is all.
        key_mask: `[B, S]` bool, True for real keys. A query without any key gives 0.
        cu_seqlens: `[num_seqs + 1]` int32 boundaries of documents packed in one row (B = 1, S = T); none sees another.
        dropout: probability that a weight is set to 0 (the others are divided by 1 − dropout); 0 outside of training.
        backend: `"auto"`, `"reference"` or `"torch"` (PyTorch's SDPA).

    Returns:
        `[B, T, H, V]` in v's dtype.

    Raises:
        ShapeError: for shapes, dtypes or devices that do not fit.
        ConfigError: for a window below 1 and a dropout outside [0, 1).
        BackendUnavailable: for a named backend that cannot serve.

    Cost:
        O(T·S·H·(K+V)) time, O(T·window) with a window; memory O(T + S) beside the output, except for masked or
        bottom-right causal calls with T > 1, which build one `[B, T, S]` mask. Packed documents run one after another;
        under torch.compile they are one node, whose backward pass computes the output again.

    Note:
        Which of PyTorch's kernels serves follows its own order. From PyTorch 2.10 on, with cuDNN 9.15.1 or later, cards
        of compute capability 9.0 and 10.0 ask cuDNN first, which is the fastest there in 16 bit; older ones flash
        attention. What these do not take, such as float32, goes to the memory-efficient kernel, and the rest to plain
        products. `torch.nn.attention.sdpa_kernel` around a call chooses otherwise.

    Source:
        Vaswani et al. 2017, arXiv 1706.03762.

    Example:
        >>> import torch
        >>> q, k, v = torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4), torch.tensor([[[[1.0]], [[3.0]]]])
        >>> softmax_attention(q, k, v).flatten().tolist()
        [1.0, 2.0]
    """
    contract = Contract("softmax_attention")
    contract.tensor("q", q, "B T H K")
    contract.tensor("k", k, "B S G K")
    contract.tensor("v", v, "B S G V")
    contract.mask("key_mask", key_mask, "B S")
    contract.packed(cu_seqlens)
    sizes = contract.sizes
    if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
        raise ShapeError(f"softmax_attention: H={sizes['H']} query heads cannot share G={sizes['G']} key heads evenly.")
    if (causal and sizes["S"] < sizes["T"]) or (cu_seqlens is not None and sizes["S"] != sizes["T"]):
        raise ShapeError(f"softmax_attention: S={sizes['S']} keys are too few for T={sizes['T']} queries.")
    if window is not None and window < 1:
        raise ConfigError(f"softmax_attention: window={window} must be at least 1, or None for all keys.")
    if not 0 <= dropout < 1:
        raise ConfigError(f"softmax_attention: dropout={dropout} must lie in [0, 1).")
    implementation = resolve("softmax_attention", backend, (q, k, v))
    return implementation(
        q,
        k,
        v,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        causal=causal,
        window=window,
        key_mask=None if key_mask is None else key_mask.bool(),
        cu_seqlens=cu_seqlens,
        dropout=dropout,
    )
