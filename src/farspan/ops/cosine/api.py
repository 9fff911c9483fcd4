"""The public function of cosine attention: checks, counts, choice of the backend, call."""

import torch
from torch import Tensor

from farspan.errors import ConfigError, ShapeError
from farspan.ops._backend import register, resolve
from farspan.ops._contract import Contract, compute_dtype, without_autocast
from farspan.ops.cosine.reference import Call, cosine_attention_reference, log_counts
from farspan.ops.cosine.torch import cosine_attention_chunked
from farspan.ops.gated_linear.limits import kernel_limits

NORM_POSITIONS = ("value", "query")

register(
    "cosine_attention",
    reference=cosine_attention_reference,
    torch=cosine_attention_chunked,
    triton="farspan.ops.cosine.triton:cosine_attention_triton",
    triton_limits=kernel_limits,
)


def cosine_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    exponent: Tensor | None = None,
    *,
    causal: bool = True,
    norm_position: str = "value",
    eps: float = 1e-12,
    padding_mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    initial_count: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attention by the cosine of query and key, without softmax, stabilised by a learned power of the length.

    For every head h, with N(x) = x / max(‖x‖, eps) and c_s the number of tokens up to and including s:

        o_t = Σ_{s≤t} (N(q_t)·N(k_s)) v_s / c_s^σ(exponent_h)                       causal
        o_t = Σ_s (N(q_t)·N(k_s)) v_s / n^σ(exponent_h),  n tokens in the sequence  bidirectional

    There is no scale, no denominator, and a weight may be negative. The causal sum is a recurrence on a matrix:
    S_t = S_{t−1} + N(k_t)ᵀ v_t / c_t^σ(exponent),  o_t = N(q_t) S_t.

    Args:
        q: queries, `[B, T, H, K]`, any floating dtype; lengths do not matter, only directions.
        k: keys, `[B, T, H, K]`; likewise.
        v: values, `[B, T, H, V]`.
        exponent: `[H]`, before the sigmoid; None leaves the division by the count out.
        causal: whether a token sees only its past.
        norm_position: when causal, whose count divides: `"value"` (released) that of the value's own place s, once and
            for all; `"query"` that of the query's place t. Bidirectional, both are the same.
        eps: least norm that is divided by; a maximum, not an added term.
        padding_mask: `[B, T]` boolean or integer, True or 1 = token. Padding is not counted, writes nothing, and its
            own outputs are 0, wherever it stands.
        initial_state: `[B, H, K, V]` (`[num_seqs, H, K, V]` when packed), float32; None means zeros. Causal only.
            Differentiable.
        initial_count: tokens behind the initial state, `[B]` (`[num_seqs]` when packed), integer; None means 0. Causal
            only; the caller adds the tokens of each call.
        output_final_state: whether to return the state after the last token. Causal only.
        cu_seqlens: boundaries of packed documents, int32 `[num_seqs + 1]` from 0 to T, with B = 1; count and state
            restart at each boundary.
        backend: `"auto"`, `"reference"`, `"torch"` or `"triton"`.

    Returns:
        `out`, `[B, T, H, V]` in v's dtype, and the final state, `[B, H, K, V]` (`[num_seqs, H, K, V]` when packed)
        in float32 (float64 for float64 inputs), or None when it was not asked for.

    Raises:
        ShapeError: shapes, dtypes, devices or boundaries that do not fit.
        ConfigError: an unknown option; a state without its count; a state for a bidirectional call.
        BackendUnavailable: a backend that was named and cannot serve.

    Cost:
        Causal as `gated_linear_attention` without decay: O(T · (C + V) · K) per head, a state of K · V numbers.
        Bidirectional 2·T·K·V multiply-adds per head, or T²·(K + V) where the sequence is so short that this is less;
        packed documents are taken one after another.

    Note:
        Dividing at the value's place makes early values heavier than late ones, for all later queries alike; dividing
        at the query's place is a different function, and released checkpoints need the former. Counts are integers
        and the power is formed in float32: 16 bits cannot tell 256 tokens from 257. The released kernel accumulates
        in the input's dtype; here states and sums are float32, whatever the input.

    Source:
        Mongaras, Dohm, Larson, "Cottention: Linear Transformers With Cosine Attention" (arXiv:2409.18747);
        gmongaras/Cottention_Transformer: GPT_Trainer/GPTCosAttention.py, BERT_Trainer/BertCosAttention.py.

    Example:
        >>> import torch
        >>> ones, exponent = torch.ones(1, 4, 1, 2), torch.full((1,), 20.0)  # σ(20) ≈ 1
        >>> out, _ = cosine_attention(ones, ones, ones[..., :1], exponent)  # 1, 1 + 1/2, 1 + 1/2 + 1/3, …
        >>> [round(x, 3) for x in out.flatten().tolist()]
        [1.0, 1.5, 1.833, 2.083]
        >>> out, _ = cosine_attention(ones, ones, ones[..., :1], exponent, causal=False)
        >>> [round(x, 3) for x in out.flatten().tolist()]
        [1.0, 1.0, 1.0, 1.0]
    """
    contract = Contract("cosine_attention")
    contract.tensor("q", q, "B T H K")
    contract.tensor("k", k, "B T H K")
    contract.tensor("v", v, "B T H V")
    contract.tensor("exponent", exponent, "H")
    contract.choice("norm_position", norm_position, NORM_POSITIONS)
    contract.mask("padding_mask", padding_mask, "B T")
    sequences = contract.packed(cu_seqlens)
    contract.bind("num_seqs", sequences, "cu_seqlens" if cu_seqlens is not None else "q's B")
    contract.tensor("initial_state", initial_state, "num_seqs H K V")
    _check_past(causal, exponent, initial_state, initial_count, output_final_state, sequences)
    implementation = resolve("cosine_attention", backend, (q, k, v, exponent, initial_state))
    with without_autocast(q):
        log_count = None
        if exponent is not None:
            dtype = compute_dtype(q, k, v, exponent, initial_state)
            log_count = log_counts(q, causal, padding_mask, initial_count, cu_seqlens, dtype)
        call = Call(log_count, exponent, norm_position == "query", padding_mask, causal, eps, cu_seqlens)
        out, state = implementation(q, k, v, initial_state, call)
    return out, state if output_final_state else None


def _check_past(
    causal: bool,
    exponent: Tensor | None,
    initial_state: Tensor | None,
    initial_count: Tensor | None,
    output_final_state: bool,
    sequences: int,
) -> None:
    if not causal and (initial_state is not None or initial_count is not None or output_final_state):
        raise ConfigError(
            "cosine_attention: causal=False has no past and no state; leave initial_state, initial_count and "
            "output_final_state out."
        )
    if initial_state is not None and initial_count is None and exponent is not None:
        raise ConfigError(
            "cosine_attention: initial_state needs initial_count, the number of tokens behind it, since values are "
            "divided by a power of the count."
        )
    if initial_count is not None and (
        initial_count.is_floating_point() or initial_count.dtype == torch.bool or initial_count.shape != (sequences,)
    ):
        raise ShapeError(
            f"cosine_attention: initial_count is {initial_count.dtype} of shape {list(initial_count.shape)}; expected "
            f"integer [num_seqs] = [{sequences}]."
        )
