"""The public function of dynamic mask attention: checks, choice of the backend, call."""

from torch import Tensor

from farspan.errors import ConfigError, ShapeError
from farspan.ops._backend import register, resolve
from farspan.ops._contract import Contract, without_autocast
from farspan.ops.dynamic_mask.limits import kernel_limits, option_limits
from farspan.ops.dynamic_mask.reference import Selection, dynamic_mask_attention_reference
from farspan.ops.dynamic_mask.torch import dynamic_mask_attention_torch

register(
    "dynamic_mask_attention",
    reference=dynamic_mask_attention_reference,
    torch=dynamic_mask_attention_torch,
    triton="farspan.ops.dynamic_mask.triton:dynamic_mask_attention_triton",
    triton_limits=kernel_limits,
)

SELECTIONS = ("none", "topk_causal", "topk_global", "relu")


def dynamic_mask_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    *,
    ranking: Tensor | None = None,
    scale: float | None = None,
    select: str = "topk_causal",
    keep: int = 2048,
    block_size: int | None = None,
    causal: bool = True,
    window: int | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention with an additive bias per key and a selection of keys by that bias:

        o_i = Σ_j softmax_j(scale · q_i·k_j + b_j) v_j   over the visible, selected keys j

    Selections, where w = keep and of equal biases the more recent key is the better:

    - `"none"`: all visible keys.
    - `"topk_causal"`: the w visible keys with the largest bias, for each query. Where the bias does not depend on the
      query and there is no window, key j is kept exactly by the queries j ≤ i < e(j) (`expiry`); in a window or with
      smoothing, by those whose limit it reaches, too (`in_window`, `in_blocks`).
    - `"topk_global"`: the w keys of the whole sequence (document) with the largest bias, of which a query sees those it
      may see. Looks at the future: which old keys survive depends on later tokens.
    - `"relu"`: the keys with b_j > 0.

    With `block_size`, the selection is smoothed afterwards: a block of that many keys is kept whole if more than half
    of it was selected, and dropped otherwise (the last block is judged on its own length). Visibility applies last.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, S, G, K]`, S ≥ T when causal; query head h reads key head h // (H/G). The last query stands at the last
            key.
        v: `[B, S, G, V]`.
        bias: `[B, S, M]` per key, or `[B, M, T, S]` per query row; query head h reads bias head h // (H/M). M divides
            H, and of G and M one divides the other. −inf hides a key.
        ranking: of bias's shape, what the top-k selections compare instead of the bias; not differentiated. For callers
            who know the order of the keys better than a rounded bias shows it.
        scale: factor on q·k, not on the bias; None is K^−½.
        select: `"none"`, `"topk_causal"`, `"topk_global"` or `"relu"`.
        keep: w, for the two top-k selections.
        block_size: keys per block of the smoothing; None is no smoothing.
        causal: whether a query sees only keys up to its own place. Without it `topk_causal` is `topk_global`.
        window: number of keys a query sees before the selection, itself included; None is all.
        key_mask: `[B, S]` bool or integer, True or 1 = a real key.
        cu_seqlens: `[num_seqs + 1]` int32 boundaries of documents packed in one row (B = 1, S = T); each selects alone.
        backend: `"auto"`, `"reference"`, `"torch"` or `"triton"` (kernels: no float64, K and V ≤ 128, a causal top-k
            with a bias per key; `topk_global` from S ≥ 4w on; window or smoothing with `topk_causal`, one of them, and
            without key_mask).

    Returns:
        `[B, T, H, V]` in v's dtype; a query without any key gives 0. The bias has a gradient at the kept keys only; the
        selection itself is not differentiated.

    Raises:
        ShapeError: for shapes, dtypes or devices that do not fit.
        ConfigError: for an unknown selection, sizes below 1, or a smoothing of no selection.
        BackendUnavailable: for a named backend that cannot serve.

    Cost:
        `topk_causal` with a bias per key and no window: O(T·w·H·(K + V)) time and O(S) memory beside what is saved for
        the backward pass (inputs, output and 8·(w/C + 1) bytes of indices per token and bias head); `topk_global` from
        S ≥ 4w on likewise. `topk_causal` in a window: the same with the window in the place of w; with smoothing, with
        2w + block_size. Other selections that do not depend on the query: as softmax attention. A bias per query row, a
        window over padding: O(T·S) time, and scores of some rows at a time. A window together with smoothing, smoothing
        over padding, a bias per query row that is not causal or smoothed: O(T·S) time and memory.

    Note:
        The published kernels select globally and apply causality afterwards; transformers selects per row. Both leave
        ties to the order of a sort. A row without keys gives 0 here; transformers averages all values there.

    Source:
        Shi et al., "Wonderful Matrices" (arXiv:2412.11834), "Trainable Dynamic Mask Sparse Attention"
        (arXiv:2508.02124).

    Example:
        >>> import torch
        >>> q, k = torch.zeros(1, 4, 1, 2), torch.zeros(1, 4, 1, 2)
        >>> v = torch.tensor([1.0, 2.0, 4.0, 8.0]).reshape(1, 4, 1, 1)
        >>> b = torch.tensor([0.0, 0.0, -1.0, 0.0]).reshape(1, 4, 1)
        >>> dynamic_mask_attention(q, k, v, b, keep=1).flatten().tolist()
        [1.0, 2.0, 2.0, 8.0]
    """
    op = "dynamic_mask_attention"
    contract = Contract(op)
    contract.tensor("q", q, "B T H K")
    contract.tensor("k", k, "B S G K")
    contract.tensor("v", v, "B S G V")
    contract.rank("bias", bias, ("B S M", "B M T S"))
    contract.tensor("ranking", ranking, "B S M" if bias.dim() == 3 else "B M T S")
    contract.mask("key_mask", key_mask, "B S")
    contract.packed(cu_seqlens)
    contract.choice("select", select, SELECTIONS)
    sizes = contract.sizes
    heads, key_heads, bias_heads = sizes["H"], sizes["G"], sizes["M"]
    if key_heads == 0 or heads % key_heads:
        raise ShapeError(f"{op}: H={heads} query heads cannot share G={key_heads} key heads evenly.")
    if bias_heads == 0 or heads % bias_heads or (key_heads % bias_heads and bias_heads % key_heads):
        raise ShapeError(
            f"{op}: M={bias_heads} bias heads do not fit H={heads} query heads and G={key_heads} key heads; M must "
            "divide H, and divide G or be a multiple of it."
        )
    if (causal and sizes["S"] < sizes["T"]) or (cu_seqlens is not None and sizes["S"] != sizes["T"]):
        raise ShapeError(f"{op}: S={sizes['S']} keys are too few for T={sizes['T']} queries.")
    for name, value in (("keep", keep), ("window", window), ("block_size", block_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{op}: {name}={value} must be at least 1.")
    if block_size is not None and select == "none":
        raise ConfigError(f"{op}: block_size={block_size} smooths a selection, but select='none' makes none.")
    selection = Selection(
        select=select,
        keep=keep,
        block_size=block_size,
        causal=causal,
        window=None if window is None or window >= sizes["S"] else window,
        key_mask=None if key_mask is None else key_mask.bool(),
        cu_seqlens=cu_seqlens,
        ranking=None if ranking is None else ranking.detach(),
    )
    beyond_kernels = option_limits(q, k, bias, selection)
    implementation = resolve(op, backend, (q, k, v, bias), beyond_kernels=beyond_kernels)
    with without_autocast(q):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out: Tensor = implementation(q, k, v, bias, scale=scale, selection=selection)
    return out
