"""The public functions of gated linear attention: checks, choice of the backend, call."""

from torch import Tensor

from farspan.errors import ShapeError
from farspan.ops._backend import register, resolve
from farspan.ops._contract import Contract, without_autocast
from farspan.ops.gated_linear.limits import kernel_limits
from farspan.ops.gated_linear.reference import gated_linear_attention_reference, per_head
from farspan.ops.gated_linear.torch import gated_linear_attention_chunked, gated_linear_attention_recurrent

register(
    "gated_linear_attention",
    reference=gated_linear_attention_reference,
    torch=gated_linear_attention_chunked,
    triton="farspan.ops.gated_linear.triton:gated_linear_attention_triton",
    triton_limits=kernel_limits,
)


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention whose memory decays.

    For every head, with `S_0 = initial_state`:

        S_t = diag(exp(log_decay_t)) S_{t-1} + k_t^T v_t          (K × V)
        o_t = scale · q_t S_t

    Without decay this is plain causal linear attention (cosine attention when q and k are normalised); with one number
    per head and token it is RetNet or Mamba-2's state-space duality; with one per channel it is GLA, and MetaLA when
    `k = 1 - exp(log_decay)`.

    Args:
        q: queries, `[B, T, H, K]`, any floating dtype; 16-bit inputs are accumulated in float32.
        k: keys, `[B, T, G, K]`; query head h reads key head h // (H/G), and its memory is its own.
        v: values, `[B, T, H, V]`.
        log_decay: natural logarithm of the decay, <= 0: `[B, T, H, K]` per channel, `[B, T, H]` per head, or None for
            no decay. 0 keeps the state unchanged. Keep it in float32: 16 bits cannot hold decays near 1.
        scale: factor of the output; None means `K ** -0.5`.
        initial_state: `[B, H, K, V]` (`[num_seqs, H, K, V]` when packed), float32; None means zeros. Differentiable.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: boundaries of packed documents, int32 `[num_seqs + 1]` from 0 to T, with B = 1; the state restarts
            at each boundary. None means that every batch row is one sequence.
        backend: `"auto"`, `"reference"`, `"torch"` or `"triton"`.

    Returns:
        `out`, `[B, T, H, V]` in v's dtype, and the final state, `[B, H, K, V]` (`[num_seqs, H, K, V]` when packed)
        in float32 (float64 for float64 inputs), or None when it was not asked for.

    Raises:
        ShapeError: shapes, dtypes, devices or boundaries that do not fit.
        ConfigError: an unknown backend.
        BackendUnavailable: a backend that was named and cannot serve.

    Cost:
        Time O(T · (C + V) · K) per head with chunks of C = 64 tokens (32 in float32 on cards without warp-group
        instructions, such as those before Hopper), memory for the backward pass O(T/C · K · V) per head beside the
        inputs. The state holds K · V numbers per head. T = 1 takes a few tensor operations.

    Note:
        The result is exact for every decay: where the decays within a chunk are moderate, one factorisation about the
        centre of the chunk serves; otherwise the chunk is split until it fits. Nothing is clamped; a decay below
        exp(-10⁴) is 0 in every dtype. Later tokens do not reach earlier outputs, except through the last bits (the
        centre depends on the whole chunk). Gradients flow to every tensor argument, through `out` and through the
        final state. That of log_decay is a sum of differences `q dq - k dk`, and rounds like these terms; the kernels
        take that of one decay per head from what is not rounded.
        The kernels take 16-bit and float32 inputs, use no atomic operations (repeated calls agree to the bit), and
        compile once per K, V, dtype and rank of the decay, whatever B, T and H are. Heads with K > 128 (K > 64 where
        chunks are of 32 tokens) run as several narrower ones, each with its own copy of v in float32. Keys that heads
        share are laid out for each of them first; `state_space_duality` reads shared keys and queries in place.

    Source:
        Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training" (arXiv:2312.06635),
        section 4; Chou et al., "MetaLA" (arXiv:2411.10741), section 3.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(2, 10, 3, 4), torch.randn(2, 10, 3, 4), torch.randn(2, 10, 3, 8)
        >>> log_decay = torch.nn.functional.logsigmoid(torch.randn(2, 10, 3, 4))
        >>> out, state = gated_linear_attention(q, k, v, log_decay, output_final_state=True)
        >>> out.shape, state.shape
        (torch.Size([2, 10, 3, 8]), torch.Size([2, 3, 4, 8]))
        >>> first, second = zip(*(x.split(6, dim=1) for x in (q, k, v, log_decay)))
        >>> head, state = gated_linear_attention(*first, output_final_state=True)
        >>> tail, _ = gated_linear_attention(*second, initial_state=state)
        >>> torch.allclose(torch.cat([head, tail], dim=1), out, atol=1e-5)
        True
    """
    contract = Contract("gated_linear_attention")
    contract.tensor("q", q, "B T H K")
    contract.tensor("k", k, "B T G K")
    contract.tensor("v", v, "B T H V")
    contract.rank("log_decay", log_decay, ("B T H", "B T H K"))
    contract.bind("num_seqs", contract.packed(cu_seqlens), "cu_seqlens" if cu_seqlens is not None else "q's B")
    contract.tensor("initial_state", initial_state, "num_seqs H K V")
    heads, groups = contract.sizes["H"], contract.sizes["G"]
    if groups == 0 or heads % groups:
        raise ShapeError(f"gated_linear_attention: H={heads} query heads cannot share G={groups} key heads evenly.")
    k = per_head(k, heads)
    implementation = resolve("gated_linear_attention", backend, (q, k, v, log_decay, initial_state))
    if backend == "auto" and cu_seqlens is None and q.shape[1] == 1:
        implementation = gated_linear_attention_recurrent
    with without_autocast(q):
        out, state = implementation(
            q,
            k,
            v,
            log_decay,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
        )
    return out, state if output_final_state else None


def gated_linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One decoding step of `gated_linear_attention`: the same call with length 1 and without the length axis.

    Args:
        q: `[B, H, K]`.
        k: `[B, G, K]`, G dividing H.
        v: `[B, H, V]`.
        log_decay: `[B, H, K]`, `[B, H]` or None.
        state: `[B, H, K, V]` float32, or None for zeros.
        scale: factor of the output; None means `K ** -0.5`.

    Returns:
        `out` `[B, H, V]` in v's dtype, and the new state `[B, H, K, V]`.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.

    Cost:
        O(K · V) per head.

    Source:
        As of `gated_linear_attention`.

    Example:
        >>> import torch
        >>> out, state = gated_linear_attention_step(torch.ones(1, 2, 4), torch.ones(1, 2, 4), torch.ones(1, 2, 3))
        >>> out[0, 0].tolist(), list(state.shape)
        ([2.0, 2.0, 2.0], [1, 2, 4, 3])
    """
    decay = None if log_decay is None else log_decay.unsqueeze(1)
    out, final = gated_linear_attention(
        q.unsqueeze(1),
        k.unsqueeze(1),
        v.unsqueeze(1),
        decay,
        scale=scale,
        initial_state=state,
        output_final_state=True,
    )
    assert final is not None  # asked for above
    return out.squeeze(1), final
