"""One decoding step of dynamic mask attention: a memory of live keys takes the new one in, in place."""

from typing import NamedTuple

import torch
from torch import Tensor

from farspan.errors import ConfigError, ShapeError
from farspan.ops._backend import register, resolve
from farspan.ops._contract import Contract, without_autocast
from farspan.ops.dynamic_mask.reference import Selection, dynamic_mask_attention_reference
from farspan.ops.rotary import apply_rotary, normed
from farspan.ops.softmax.step import beyond_steps

GONE = float("-inf")


class LiveKeys(NamedTuple):
    """S slots for the keys that can still be chosen, contiguous and changed in place.

    Attributes:
        keys: `[B, S, G, K]`.
        values: `[B, S, G, V]`.
        biases: `[B, S, G, R]`, of the R bias heads that share a key head.
        rankings: `[B, S, G, R]`; −inf where a slot is free for a bias head.
        born: `[B, S, G]` int32, the number of each key's token.
        seen: `[B]` int32, tokens so far.
    """

    keys: Tensor
    values: Tensor
    biases: Tensor
    rankings: Tensor
    born: Tensor
    seen: Tensor


def dynamic_mask_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    ranking: Tensor,
    live: LiveKeys,
    *,
    keep: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    norms: tuple[Tensor, Tensor] | None = None,
    norm_eps: float = 1e-6,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`dynamic_mask_attention` with `topk_causal` of one token per row, behind a memory of the live keys; no gradients.

        of the live keys of a bias head and the new one, where they are more than w, the worst dies, of equals the
        oldest;  the new key takes a slot that is free for all R bias heads of its key head, if it lives for any
        o = Σ_s softmax_s(scale · R q · keys_s + biases_s) values_s over the slots that live;  n ← n + 1

    No value is asked of the device.

    Args:
        q: `[B, 1, H, K]`.
        k, v: `[B, 1, G, K]` and `[B, 1, G, V]`; query head h reads key head h // (H/G).
        bias, ranking: `[B, 1, M]` float32 or float64, M = G·R; query head h reads bias head h // (H/M). A ranking of
            −inf hides the token.
        live: the memory; n is `live.seen`. There has to be a free slot, which S ≥ w·R grants.
        keep: w.
        cos, sin: `[B, 1, r/2]` float32, of the rotation R of the first r channels; None rotates nothing.
        norms: weights `[K]` of the RMS norms that queries and keys pass before the rotation; None is no norm.
        norm_eps: epsilon of these norms.
        scale: factor on q·k; None is K^−½.
        backend: `"auto"`, `"reference"`, `"torch"` (the same function) or `"triton"`.

    Returns:
        `[B, 1, H, V]` in v's dtype; 0 where no key lives.

    Raises:
        ShapeError: shapes or devices that do not fit, or memories that are not contiguous.
        ConfigError: for w below 1.
        BackendUnavailable: a backend that was named and cannot serve.

    Cost:
        One read of the S slots, whatever the text's length; three kernels on a GPU.

    Source:
        Shi et al., arXiv:2412.11834; the memory of live keys is this library's.

    Example:
        >>> import torch
        >>> q, one, age = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int32)
        >>> live = LiveKeys(q.clone(), one.clone(), one.clone(), one - torch.inf, age.reshape(1, 1, 1).clone(), age)
        >>> for x, b in ((1.0, 0.0), (3.0, -1.0), (5.0, 2.0)):
        ...     v, bias = torch.full((1, 1, 1, 1), x), torch.full((1, 1, 1), b)
        ...     print(dynamic_mask_step(q, q, v, bias, bias, live, keep=1).item())
        1.0
        1.0
        5.0
    """
    op = "dynamic_mask_step"
    contract = Contract(op)
    contract.bind("T", 1, "a step")
    contract.tensor("q", q, "B T H K")
    contract.tensor("k", k, "B T G K")
    contract.tensor("v", v, "B T G V")
    contract.tensor("bias", bias, "B T M")
    contract.tensor("ranking", ranking, "B T M")
    contract.tensor("live.keys", live.keys, "B S G K")
    contract.tensor("live.values", live.values, "B S G V")
    contract.tensor("live.biases", live.biases, "B S G R")
    contract.tensor("live.rankings", live.rankings, "B S G R")
    contract.mask("live.born", live.born, "B S G")
    contract.mask("live.seen", live.seen, "B")
    contract.tensor("cos", cos, "B T r/2")
    contract.tensor("sin", sin, "B T r/2")
    for norm in norms or ():
        contract.tensor("norms", norm, "K")
    sizes = contract.sizes
    heads, key_heads, bias_heads = sizes["H"], sizes["G"], sizes["M"]
    if bias_heads == 0 or bias_heads != key_heads * sizes["R"] or heads % bias_heads:
        raise ShapeError(
            f"{op}: M={bias_heads} bias heads have to be G={key_heads} times R={sizes['R']} and to divide H={heads}."
        )
    if not all(x.is_contiguous() for x in live):
        raise ShapeError(f"{op}: the tensors of the live keys are changed in place and have to be contiguous.")
    if keep < 1:
        raise ConfigError(f"{op}: keep={keep} must be at least 1.")
    implementation = resolve(op, backend, (q, k, v, *live[:4]))
    with torch.no_grad(), without_autocast(q):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        turns = {"cos": cos, "sin": sin, "norms": norms, "norm_eps": norm_eps}
        out: Tensor = implementation(q, k, v, bias, ranking, live, keep=keep, scale=scale, **turns)
    return out


def dynamic_mask_step_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    ranking: Tensor,
    live: LiveKeys,
    *,
    keep: int,
    cos: Tensor | None,
    sin: Tensor | None,
    norms: tuple[Tensor, Tensor] | None,
    norm_eps: float,
    scale: float,
) -> Tensor:
    """The formulas as they stand; arguments as `dynamic_mask_step`."""
    keys, values, biases, rankings, born, seen = live
    if norms is not None:
        q, k = (normed(x, w, norm_eps) for x, w in zip((q, k), norms, strict=True))
    if cos is not None and sin is not None:
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    bias, ranking = bias.unflatten(2, rankings.shape[2:]), ranking.unflatten(2, rankings.shape[2:])
    age = seen[:, None, None].expand_as(born[:, :1])
    held, ages = torch.cat((rankings, ranking), dim=1), torch.cat((born, age), dim=1)
    lives = held > GONE
    lowest = held.masked_fill(~lives, -GONE).amin(1, keepdim=True)
    oldest = ages.unsqueeze(-1).masked_fill(~lives | (held != lowest), torch.iinfo(born.dtype).max)
    worst = oldest.argmin(1, keepdim=True)
    crowded = lives.sum(1, keepdim=True) > keep
    held.scatter_(1, worst, held.gather(1, worst).masked_fill(crowded, GONE))
    rankings.copy_(held[:, :-1])
    ranking = held[:, -1:]
    # If the new key lives, a slot is free: at most w per sharing bias head live, itself among them.
    free = (rankings > GONE).any(-1).to(torch.int8).argmin(1, keepdim=True)
    stays = (ranking > GONE).any(-1)
    for memory, new in ((keys, k), (values, v), (biases, bias), (rankings, ranking), (born, age)):
        slot, kept = (x.reshape(*x.shape, *[1] * (memory.dim() - 3)).expand_as(memory[:, :1]) for x in (free, stays))
        memory.scatter_(1, slot, torch.where(kept, new.to(memory.dtype), memory.gather(1, slot)))
    seen += 1
    bias = biases.masked_fill(rankings == GONE, GONE).flatten(2)
    every = Selection(select="none", causal=False)
    return dynamic_mask_attention_reference(q, keys.to(q.dtype), values.to(v.dtype), bias, scale=scale, selection=every)


register(
    "dynamic_mask_step",
    reference=dynamic_mask_step_torch,
    torch=dynamic_mask_step_torch,
    triton="farspan.ops.dynamic_mask.step_triton:dynamic_mask_step_triton",
    triton_limits=beyond_steps,
)
