"""The public functions of collinear attention: checks, choice of the backend, call."""

import torch
from torch import Tensor

from farspan.errors import ConfigError, ShapeError
from farspan.ops._backend import no_double, register, resolve
from farspan.ops._contract import Contract
from farspan.ops.collinear.reference import collinear_attention_reference, tied_means
from farspan.ops.collinear.torch import collinear_attention_fused

FORMS = ("slack", "strict")
TIES = ("rotary", "head")


def coefficients_by_means(raw: Tensor, rotary_dim: int, tie: str) -> Tensor:
    """See `collinear_coefficients`."""
    return torch.relu(tied_means(raw, rotary_dim, tie))


register(
    "collinear_attention",
    reference=collinear_attention_reference,
    torch=collinear_attention_fused,
    triton="farspan.ops.collinear.triton:collinear_attention_triton",
    triton_limits=no_double,
)
register(
    "collinear_coefficients",
    reference=coefficients_by_means,
    torch=coefficients_by_means,
    triton="farspan.ops.collinear.triton:collinear_coefficients_triton",
    triton_limits=no_double,
)


def collinear_coefficients(
    raw: Tensor, rotary_dim: int | None = None, *, tie: str = "rotary", backend: str = "auto"
) -> Tensor:
    """One non-negative coefficient for every tied pair of channels, t = relu((raw_c + raw_c') / 2).

    Args:
        raw: output of the T projection, `[B, S, G, K]`, K even.
        rotary_dim: r, even; the number of rotated channels. None is K.
        tie: which channels (c, c') are tied. `"rotary"`: the rotary pairs (j, j + r/2), and the halves of the channels
            that are not rotated. `"head"`: the halves of the whole head, (j, j + K/2), as the released GPT-NeoX code
            does; with r < K no rotary pair is tied then. The same for r = K.
        backend: `"auto"`, `"reference"`, `"torch"` (the same function) or `"triton"`.

    Returns:
        t, `[B, S, G, K/2]` in raw's dtype: all that a cache of keys must keep. For a raw pair whose mean is not
        positive both t and the gradient are 0.

    Raises:
        ShapeError: K or r is odd, or r exceeds K.
        ConfigError: for an unknown tie or backend.
        BackendUnavailable: for a named backend that cannot serve.

    Cost:
        O(S·G·K).

    Source:
        Zhu et al. 2023, arXiv 2309.08646, equation 6; the mean and its place before the relu as in
        codefuse-ai/Collinear-Constrained-Attention: model/llama/modeling_llama.py.

    Example:
        >>> raw = torch.tensor([1.0, -2.0, 2.0, -4.0, 3.0, 8.0, 4.0, 0.0]).reshape(1, 1, 1, 8)
        >>> collinear_coefficients(raw).flatten().tolist()
        [2.0, 3.0, 3.0, 0.0]
        >>> collinear_coefficients(raw, rotary_dim=4).flatten().tolist()
        [1.5, 0.0, 3.5, 4.0]
    """
    contract = Contract("collinear_coefficients")
    contract.tensor("raw", raw, "B S G K")
    contract.choice("tie", tie, TIES)
    width = raw.shape[-1]
    rotary_dim = width if rotary_dim is None else rotary_dim
    if width % 2 or rotary_dim % 2 or not 0 <= rotary_dim <= width:
        raise ShapeError(
            f"collinear_coefficients: K={width} channels with rotary_dim={rotary_dim} cannot be tied in pairs; both "
            "must be even, and rotary_dim at most K."
        )
    t: Tensor = resolve("collinear_coefficients", backend, (raw,))(raw, rotary_dim, tie)
    return t


def collinear_attention(
    q: Tensor,
    t: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    form: str = "slack",
    tie: str = "rotary",
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention in which a query sees itself, scaled by t, in the place of every key.

    Before rotation the angle between query and key is 0 in every rotary plane. With R_n the rotation by position n and
    t_n spread over the tied channels, query m gives key n the score

        slack:   S(m, n) = scale · ⟨R_m q_m, q_m ∘ (R_n t_n)⟩    = scale · ⟨q_m ∘ R_m q_m, R_n t_n⟩
        strict:  S(m, n) = scale · ⟨R_m q_m, (R_n q_m) ∘ t_n⟩    = scale · Σ_j t_nj |q_mj|² cos((m − n) θ_j)

    and o_m = Σ_n softmax_n(S(m, n)) v_n. Both are dot products of a transformed query with a transformed key, so one
    call of `softmax_attention` computes them. A channel without rotation adds q_c² t_c at every distance.

    Args:
        q: `[B, T, H, K]`.
        t: coefficients from `collinear_coefficients`, `[B, S, G, K/2]`; query head h reads head h // (H/G). The T
            queries stand at the last T of the S places, so that with a cache S − T keys are older.
        v: `[B, S, G, V]`.
        cos, sin: `[B, S, r/2]` float32, of the angles n·θ_j at the place of every key; r ≤ K channels are rotated.
        form: `"slack"`, the released form, or `"strict"`, the paper's equation 9.
        tie: as for `collinear_coefficients`. The strict form needs tied rotary pairs: `"rotary"`, or r = K.
        scale: factor on the scores; None is K^−½, whatever r is.
        causal, window, key_mask, cu_seqlens: which key a query sees, as for `softmax_attention`.
        backend: `"auto"`, `"reference"`, `"torch"` or `"triton"` (one kernel makes query and key).

    Returns:
        `[B, T, H, V]` in v's dtype.

    Raises:
        ShapeError: for shapes, dtypes or devices that do not fit.
        ConfigError: for an unknown form or tie, a window below 1, or the strict form with pairs that are not tied.
        BackendUnavailable: for a named backend that cannot serve.

    Cost:
        That of `softmax_attention`, and O((T·H + S·G)·K) for the transforms. A cache needs K/2 numbers per key and
        head, since the positions give the rest.

    Note:
        Strict scores depend on distances alone. Slack scores also depend on absolute positions, unless both channels
        of a query pair are equal; the paper's headline tables use them. The released code has no strict form, and
        ties the whole head also where only a part of it is rotated. Scores are quadratic in q: the transform is made
        in float32 with the scale inside and rounded once.

    Source:
        Zhu et al. 2023, arXiv 2309.08646, equations 6 to 10; codefuse-ai/Collinear-Constrained-Attention:
        model/llama/modeling_llama.py, model/gpt_neox/modeling_gpt_neox.py.

    Example:
        >>> angles = torch.arange(3.0).reshape(1, 3, 1) * torch.tensor([1.0, 0.1])
        >>> q, v = torch.ones(1, 3, 2, 4), torch.arange(3.0).reshape(1, 3, 1, 1)
        >>> t = collinear_coefficients(torch.zeros(1, 3, 1, 4))  # no key is preferred: running means
        >>> collinear_attention(q, t, v, angles.cos(), angles.sin())[0, :, 0, 0].tolist()
        [0.0, 0.5, 1.0]
    """
    contract = Contract("collinear_attention")
    contract.tensor("q", q, "B T H K")
    width = q.shape[-1]
    contract.bind("K/2", width // 2, "q's K")
    contract.tensor("t", t, "B S G K/2")
    contract.tensor("v", v, "B S G V")
    contract.tensor("cos", cos, "B S r/2")
    contract.tensor("sin", sin, "B S r/2")
    contract.choice("form", form, FORMS)
    contract.choice("tie", tie, TIES)
    rotary_dim = 2 * cos.shape[-1]
    if width % 2 or rotary_dim > width:
        raise ShapeError(
            f"collinear_attention: K={width} channels cannot hold pairs of which r/2={rotary_dim // 2} are rotated; "
            "K must be even and at least r."
        )
    if t.shape[1] < q.shape[1]:
        raise ShapeError(f"collinear_attention: S={t.shape[1]} keys are too few for T={q.shape[1]} queries.")
    if form == "strict" and tie == "head" and rotary_dim < width:
        raise ConfigError(
            f"collinear_attention: form='strict' needs tied rotary pairs, but tie='head' ties none of them when "
            f"{rotary_dim} of K={width} channels are rotated; use tie='rotary' or form='slack'."
        )
    return resolve("collinear_attention", backend, (q, t, v))(
        q,
        t,
        v,
        cos,
        sin,
        form=form,
        tie=tie,
        scale=width**-0.5 if scale is None else scale,
        causal=causal,
        window=window,
        key_mask=None if key_mask is None else key_mask.bool(),
        cu_seqlens=cu_seqlens,
    )
