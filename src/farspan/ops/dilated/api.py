"""The public function of dilated attention: checks, choice of the backend, call."""

from collections.abc import Sequence

from torch import Tensor

from farspan.errors import ConfigError, ShapeError
from farspan.ops._backend import register, resolve
from farspan.ops._contract import Contract
from farspan.ops.dilated.limits import kernel_limits, option_limits
from farspan.ops.dilated.patterns import OFFSET_RULES, PAD_MODES, DilatedSettings, sequences
from farspan.ops.dilated.reference import dilated_attention_reference
from farspan.ops.dilated.torch import dilated_attention_strided

register(
    "dilated_attention",
    reference=dilated_attention_reference,
    torch=dilated_attention_strided,
    triton="farspan.ops.dilated.triton:dilated_attention_triton",
    triton_limits=kernel_limits,
)


def check_patterns(segment_lengths: Sequence[int], dilations: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The pairs (segment length, dilation), checked.

    Raises:
        ConfigError: lists of different or zero length, or entries that are not integers of at least 1.
    """
    for name, values in (("segment_lengths", segment_lengths), ("dilations", dilations)):
        whole = all(isinstance(value, int) and not isinstance(value, bool) and value >= 1 for value in values)
        if not values or not whole:
            raise ConfigError(f"{name}={list(values)} must hold at least one integer, each at least 1.")
    if len(segment_lengths) != len(dilations):
        raise ConfigError(
            f"segment_lengths={list(segment_lengths)} and dilations={list(dilations)} must be equally long: "
            "entry i of both is one pattern."
        )
    return tuple(zip(segment_lengths, dilations, strict=True))


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segment_lengths: Sequence[int],
    dilations: Sequence[int],
    head_offset: str = "mod",
    causal: bool = True,
    scale: float | None = None,
    distance_bias: Tensor | None = None,
    frequencies: Tensor | None = None,
    growth: Tensor | None = None,
    dropout: float = 0.0,
    detach_mixture_weights: bool = False,
    pad_mode: str = "mask",
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention over the keys that several dilated patterns select, each counted as often as it is selected.

    Pattern i cuts a sequence into segments of w_i tokens and keeps, for head j, the rows p with (p mod w_i) mod r_i =
    s_ij. A kept query sees the kept keys of its own segment:

        o_t = Σ_i Σ_{s ∈ N_i(t)} e^{a_ts} v_s / Σ_i Σ_{s ∈ N_i(t)} e^{a_ts},   a_ts = scale·q_t·k_s + b(s − t)

    which is Σ_i α_i o_i with α = softmax over patterns of their log-sum-exps. A query that no pattern keeps gives 0.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, G, K]`; query head h reads key head h // (H/G), at the offset of the query head.
        v: `[B, T, G, V]`.
        segment_lengths: w_i ≥ 1, any numbers: a last segment may be shorter, w may exceed T.
        dilations: r_i ≥ 1, one per segment length; need not divide it.
        head_offset: s_ij = j mod r_i (`"mod"`, paper), ⌊j / ⌈H/r_i⌉⌋ (`"block"`, torchscale) or 0 (`"none"`).
        causal: whether a query sees only keys up to its own place.
        scale: factor on the scores; None is K^−½.
        distance_bias: `[H, 2M − 1]`, b(d) at index M − 1 + d for distance d = s − t in tokens; M at least the widest
            segment or T, whichever is less.
        frequencies: `[K/2]` ω; channel pairs (2j, 2j+1) turn by ω_j a token. Given together with `growth`.
        growth: `[K/2]` g; products of pair j are multiplied by e^{g_j (t − s)}. Positions count from the middle of each
            segment, so that |g|·w bounds all exponents; it should stay below 85.
        dropout: probability of dropping an attention weight; pass 0 outside training.
        detach_mixture_weights: True treats α as constants in backward (torchscale). Outputs are the same.
        pad_mode: `"mask"`: a ragged segment has fewer keys. `"zero_keys"`: what torchscale computes, for its weights,
            see the note.
        cu_seqlens: `[num_seqs + 1]` int32 boundaries of documents packed in one row; segments restart in each.
        backend: `"auto"`, `"reference"`, `"torch"` or `"triton"`: cuDNN for 16 bit, K = V, no bias and no packed
            documents, kernels for the rest; not for dropout, filled segments, float64, K or V > 128 (float32: 64), nor
            for `frequencies` where segments do not divide the longest, or positions grow beyond float16.

    Returns:
        `[B, T, H, V]` in v's dtype.

    Raises:
        ShapeError: for shapes, dtypes or devices that do not fit, also a `distance_bias` that is too short.
        ConfigError: for patterns, names or a dropout that are not accepted.
        BackendUnavailable: for a named backend that cannot serve.

    Cost:
        O(T·Σ w_i/r_i²) time per head. Kept for backward: q, k, v, the output and one float per row and head. Outside
        the kernels, with dropout, `detach_mixture_weights`, a `distance_bias` that needs a gradient, or V ≠ K: also the
        weights, O(T·Σ w_i/r_i²), and a bias takes (w/r)² numbers per head at a time. Under torch.compile packed
        documents are one node; outside the kernels its backward pass computes the output again.

    Note:
        torchscale fills the last segment, and every segment whose length r does not divide, with rows of zeros: keys
        of score 0 and value 0 that dilute the result when not causal. It never takes the latter out again, so that
        behind the first segment of such a pattern row p holds the output of an earlier token or of a row of zeros.
        `pad_mode="zero_keys"` reproduces both. It also treats a log-sum-exp of exactly 0 as "not covered", and attends
        to padded tokens; neither is reproduced.

    Source:
        Ding et al. 2023, arXiv 2307.02486, sections 2.2 and 2.3; microsoft/torchscale:
        torchscale/component/dilated_attention.py.

    Example:
        >>> import torch
        >>> q = k = torch.zeros(1, 4, 1, 2)
        >>> v = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
        >>> out = dilated_attention(q, k, v, segment_lengths=[2, 4], dilations=[1, 2])
        >>> [round(x, 4) for x in out.flatten().tolist()]
        [1.0, 1.5, 2.3333, 3.5]
    """
    contract = Contract("dilated_attention")
    contract.tensor("q", q, "B T H K")
    contract.tensor("k", k, "B T G K")
    contract.tensor("v", v, "B T G V")
    contract.packed(cu_seqlens)
    contract.choice("head_offset", head_offset, OFFSET_RULES)
    contract.choice("pad_mode", pad_mode, PAD_MODES)
    patterns = check_patterns(segment_lengths, dilations)
    if not 0 <= dropout < 1:
        raise ConfigError(f"dilated_attention: dropout={dropout} must lie in [0, 1).")
    sizes = contract.sizes
    if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
        raise ShapeError(f"dilated_attention: H={sizes['H']} query heads cannot share G={sizes['G']} key heads evenly.")
    if (frequencies is None) != (growth is None):
        raise ConfigError("dilated_attention: frequencies and growth belong together; give both or neither.")
    if frequencies is not None:
        if sizes["K"] % 2:
            raise ShapeError(f"dilated_attention: frequencies turn channel pairs, but K={sizes['K']} is odd.")
        contract.bind("K/2", sizes["K"] // 2, "q")
        contract.tensor("frequencies", frequencies, "K/2")
        contract.tensor("growth", growth, "K/2")
    if distance_bias is not None:
        contract.tensor("distance_bias", distance_bias, "H R")
        longest = max([0] + [end - start for start, end in sequences(cu_seqlens, sizes["T"])])
        reach = min(max(segment_lengths), longest)
        if sizes["R"] % 2 == 0 or sizes["R"] < 2 * reach - 1:
            raise ShapeError(
                f"dilated_attention: distance_bias has {sizes['R']} distances; expected an odd number of at least "
                f"{2 * reach - 1}, with distance 0 in the middle."
            )
    settings = DilatedSettings(
        patterns=patterns,
        head_offset=head_offset,
        causal=causal,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        dropout=dropout,
        detach_mixture_weights=detach_mixture_weights,
        zero_keys=pad_mode == "zero_keys",
        distance_bias=distance_bias,
        frequencies=frequencies,
        growth=growth,
    )
    beyond_kernels = option_limits(q, settings, cu_seqlens)
    implementation = resolve("dilated_attention", backend, (q, k, v), beyond_kernels=beyond_kernels)
    return implementation(q, k, v, settings, cu_seqlens)
