"""One decoding step of MetaLA, with the state updated in place."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from farspan.ops._backend import no_double, register, resolve
from farspan.ops._contract import Contract, changed_in_place, without_autocast
from farspan.ops.metala.reference import augment_and_normalize, decay_and_key


class Call(NamedTuple):
    """What an implementation knows of a call beside its streams and its state; see `metala_step`."""

    key: Tensor | None
    output_gate: Tensor | None
    scale: float
    decay_normalizer: float
    augmentation_inside: bool
    normalize: bool
    norm_eps: float


def metala_step(
    q: Tensor,
    gate_logits: Tensor,
    v: Tensor,
    augmentation: Tensor | None,
    state: Tensor,
    *,
    key: Tensor | None = None,
    output_gate: Tensor | None = None,
    scale: float | None = None,
    decay_normalizer: float = 16.0,
    augmentation_inside: bool = True,
    normalize: bool = True,
    norm_eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """`metala_attention` of one token per row, which changes `state` itself; no gradients.

        S ← diag(e^a) S + kᵀ v;  o = scale · q S + sigmoid(u v);  out = SiLU(g) ∘ LayerNorm(o)

    Args:
        q, gate_logits, v, augmentation, key: as in `metala_attention`, with T = 1.
        state: `[B, H, K, V]` float32 (float64 for float64 inputs), contiguous; updated in place.
        output_gate: g, `[B, 1, H, V]`, whose SiLU multiplies the output; None leaves it out.
        scale, decay_normalizer, augmentation_inside, normalize, norm_eps: as in `metala_attention`.
        backend: `"auto"`, `"reference"`, `"torch"` or `"triton"`.

    Returns:
        `out`, `[B, 1, H, V]` in v's dtype.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
        BackendUnavailable: a backend that was named and cannot serve.

    Cost:
        One read and one write of the state, 2·B·H·K·V numbers; one kernel on a GPU.

    Source:
        Chou et al., "MetaLA" (arXiv:2411.10741), section 4.

    Example:
        >>> import torch
        >>> q, z, v = torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 8)
        >>> state = torch.zeros(2, 3, 4, 8)
        >>> out = metala_step(q, z, v, torch.zeros(3, 4), state)
        >>> out.shape, bool(state.any())
        (torch.Size([2, 1, 3, 8]), True)
    """
    contract = Contract("metala_step")
    contract.bind("T", 1, "a step")
    contract.tensor("q", q, "B T H K")
    contract.tensor("gate_logits", gate_logits, "B T H K")
    contract.tensor("v", v, "B T H V")
    contract.tensor("augmentation", augmentation, "H K")
    contract.tensor("key", key, "B T H K")
    contract.tensor("output_gate", output_gate, "B T H V")
    contract.tensor("state", state, "B H K V")
    changed_in_place("metala_step", state, q, v)
    implementation = resolve("metala_step", backend, (q, gate_logits, v, augmentation, key, output_gate, state))
    with torch.no_grad(), without_autocast(q):
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        call = Call(key, output_gate, factor, decay_normalizer, augmentation_inside, normalize, norm_eps)
        out: Tensor = implementation(q, gate_logits, v, augmentation, state, call)
    return out


def metala_step_torch(
    q: Tensor, gate_logits: Tensor, v: Tensor, augmentation: Tensor | None, state: Tensor, call: Call
) -> Tensor:
    """The formulas as they stand; arguments as `metala_step`."""
    log_decay, k = decay_and_key(gate_logits, call.key, call.decay_normalizer, None)
    q_row, k_row, v_row = (x[:, 0].to(state.dtype) for x in (q, k, v))
    state.mul_(log_decay[:, 0].exp().unsqueeze(-1)).addcmul_(k_row.unsqueeze(-1), v_row.unsqueeze(-2))
    out = call.scale * (q_row.unsqueeze(-2) @ state).transpose(1, 2)
    out = augment_and_normalize(out, q, k, v, augmentation, call.augmentation_inside, call.normalize, call.norm_eps).to(
        v.dtype
    )
    return out if call.output_gate is None else F.silu(call.output_gate) * out


register(
    "metala_step",
    reference=metala_step_torch,
    torch=metala_step_torch,
    triton="farspan.ops.metala.step_triton:metala_step_triton",
    triton_limits=no_double,
)
