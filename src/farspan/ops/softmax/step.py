"""One decoding step of softmax attention, with keys and values written in place and their number read on the device."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from farspan.errors import ShapeError
from farspan.ops._backend import register, resolve
from farspan.ops._contract import Contract, without_autocast
from farspan.ops.rotary import apply_rotary


class Ring(NamedTuple):
    """S slots for keys and values, contiguous; once all are filled, the oldest token's is written over.

    Attributes:
        keys: `[B, S, G, K]`, or what a mechanism keeps in their place.
        values: `[B, S, G, V]`.
        filled: `[B]` int32, tokens written so far; the next goes to slot filled mod S.
        mask: `[B, S]` bool, True for real keys; None when all are.
    """

    keys: Tensor
    values: Tensor
    filled: Tensor
    mask: Tensor | None = None

    def check(self, contract: Contract, keys: str) -> None:
        """Checks the ring against what a contract knows already.

        Args:
            contract: of the operator.
            keys: layout of the keys, in letters.

        Raises:
            ShapeError: for shapes or heads that do not fit, a ring that is not contiguous or empty, or a
                count that is not int32.
        """
        contract.tensor("ring.keys", self.keys, keys)
        contract.tensor("ring.values", self.values, "B S G V")
        contract.mask("ring.filled", self.filled, "B")
        contract.mask("ring.mask", self.mask, "B S")
        op, sizes = contract.op, contract.sizes
        if any(x is not None and not x.is_contiguous() for x in self):
            raise ShapeError(f"{op}: the tensors of a ring are changed in place and have to be contiguous.")
        if self.filled.dtype != torch.int32 or sizes["S"] == 0:
            given = f"ring.filled is {self.filled.dtype} for S={sizes['S']} slots"
            raise ShapeError(f"{op}: {given}; give int32, and one slot or more.")
        if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
            raise ShapeError(f"{op}: H={sizes['H']} query heads cannot share G={sizes['G']} key heads evenly.")

    def write(self, k: Tensor, v: Tensor) -> Tensor:
        """Takes `[B, 1, G, …]` in, and counts it; returns which slots hold real tokens, `[B, S]` bool."""
        slots = self.keys.shape[1]
        place = (self.filled % slots).long()
        for buffer, new in ((self.keys, k), (self.values, v)):
            buffer.scatter_(1, place[:, None, None, None].expand_as(new), new.to(buffer.dtype))
        seen = torch.arange(slots, device=place.device) <= self.filled.unsqueeze(1)
        self.filled.add_(1)
        return seen if self.mask is None else seen & self.mask.scatter_(1, place.unsqueeze(1), True)


def softmax_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring: Ring,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`softmax_attention` of one token per row behind a ring of keys, which takes the new one in; no gradients.

        keys[n mod S] ← R k;  values[n mod S] ← v;  o = Σ_s softmax_s(scale · R q · keys_s) values_s;  n ← n + 1

    over the min(n + 1, S) slots that are filled, n = `filled`. No value is asked of the device.

    Args:
        q: `[B, 1, H, K]`.
        k, v: `[B, 1, G, K]` and `[B, 1, G, V]`; query head h reads key head h // (H/G).
        ring: the keys, already rotated, and values; changed in place.
        cos, sin: `[B, 1, r/2]` float32, of the rotation R of the first r channels; None rotates nothing.
        interleaved: which channels make a pair, as for `apply_rotary`.
        scale: factor on the scores; None is K^−½.
        backend: `"auto"`, `"reference"`, `"torch"` (the same function) or `"triton"`.

    Returns:
        `[B, 1, H, V]` in v's dtype.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit, or a ring that is not contiguous.
        BackendUnavailable: a backend that was named and cannot serve.

    Cost:
        One read of the filled slots, whatever S is; two kernels on a GPU, and partial sums of at most 128 stretches.

    Source:
        Vaswani et al. 2017, arXiv 1706.03762; the merging of stretches as in Dao et al. 2023, Flash-Decoding.

    Example:
        >>> import torch
        >>> q, ring = torch.zeros(1, 1, 1, 4), Ring(*torch.zeros(2, 1, 8, 1, 4), torch.zeros(1, dtype=torch.int32))
        >>> [softmax_attention_step(q, q, torch.full_like(q, x), ring)[0, 0, 0, 0].item() for x in (1.0, 3.0)]
        [1.0, 2.0]
    """
    contract = Contract("softmax_attention_step")
    contract.bind("T", 1, "a step")
    contract.tensor("q", q, "B T H K")
    contract.tensor("k", k, "B T G K")
    contract.tensor("v", v, "B T G V")
    contract.tensor("cos", cos, "B T r/2")
    contract.tensor("sin", sin, "B T r/2")
    ring.check(contract, "B S G K")
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.no_grad(), without_autocast(q):
        implementation = resolve("softmax_attention_step", backend, (q, k, v, ring.keys, ring.values))
        out: Tensor = implementation(q, k, v, ring, cos, sin, interleaved, factor)
    return out


def softmax_attention_step_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring: Ring,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    scale: float,
) -> Tensor:
    """The formulas as they stand; arguments as `softmax_attention_step`."""
    if cos is not None and sin is not None:
        q, k = (apply_rotary(x, cos, sin, interleaved) for x in (q, k))
    seen = ring.write(k, v)
    return attend_slots(q, ring.keys, ring.values, seen, scale)


def attend_slots(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Attention of `[B, 1, H, K]` to the slots `seen` `[B, S]`: `[B, 1, H, V]`."""
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        keys.to(q.dtype).transpose(1, 2),
        values.to(q.dtype).transpose(1, 2),
        attn_mask=seen[:, None, None],
        scale=scale,
        enable_gqa=q.shape[2] != keys.shape[2],
    )
    return out.transpose(1, 2)


def beyond_steps(tensors: Sequence[Tensor]) -> str | None:
    """Why the kernels cannot serve these tensors; None if they can."""
    if any(x.dtype == torch.float64 for x in tensors):
        return "the kernels compute in float32"
    if tensors[0].shape[-1] > 256 or tensors[2].shape[-1] > 256:
        return "the kernels take heads of at most 256 channels"
    return "the kernels take at most 65535 rows" if len(tensors[0]) > 65535 else None


register(
    "softmax_attention_step",
    reference=softmax_attention_step_torch,
    torch=softmax_attention_step_torch,
    triton="farspan.ops.softmax.step_triton:softmax_attention_step_triton",
    triton_limits=beyond_steps,
)
