"""Cross entropy of a language-model head that never holds the logits of all tokens at once."""

from typing import Any

import torch
from torch import Tensor

from farspan.errors import ShapeError

IGNORE_INDEX = -100
# 2^22 logits: 16 MiB in float32, large enough for full matrix-multiply speed.
_CHUNK_ELEMENTS = 1 << 22


def _chunks(tokens: int, vocabulary: int) -> int:
    return max(1, min(tokens, _CHUNK_ELEMENTS // max(vocabulary, 1)))


def _check(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != weight.shape[-1]:
        raise ShapeError(
            f"hidden [..., D]={list(hidden.shape)}, weight [V, D]={list(weight.shape)} and labels "
            f"[...]={list(labels.shape)} do not fit: labels need hidden's leading shape and weight its last dimension."
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ShapeError(f"labels are {labels.dtype}; give token ids as int64, {IGNORE_INDEX} where none is scored.")
    # Reads a value from the device: once per call, beside a matrix product with the whole vocabulary.
    if not torch.compiler.is_compiling() and labels.numel():
        wrong = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= weight.shape[0]))
        if bool(wrong.any()):
            raise ShapeError(
                f"labels hold {int(labels[wrong][0])}; accepted are token ids 0 to {weight.shape[0] - 1}, and "
                f"{IGNORE_INDEX} where nothing is scored."
            )


def _nll(logits: Tensor, labels: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 log-normaliser and negative log-likelihood, 0 where a label is ignored."""
    normaliser = torch.logsumexp(logits, dim=-1)
    picked = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return normaliser, (normaliser - picked).masked_fill(~kept, 0.0)


def token_nll(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of each label: nll_t = logsumexp(W h_t + b) − (W h_t + b)[label_t]. No gradient.

    Args:
        hidden: `[..., D]` last hidden states.
        weight: `[V, D]` of the head.
        labels: `[...]` int64, aligned: `labels[t]` is what position t must predict; −100 is ignored.
        bias: `[V]` or None.

    Returns:
        `[...]` float32 in nats, 0 at ignored labels.

    Cost: O(N·V·D) time, memory for at most 4 million logits.
    """
    _check(hidden, weight, labels)
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    step = _chunks(flat.shape[0], weight.shape[0])
    pieces = []
    with torch.no_grad():
        for rows, target in zip(flat.split(step), targets.split(step), strict=True):
            logits = torch.nn.functional.linear(rows, weight, bias).float()
            pieces.append(_nll(logits, target, target != IGNORE_INDEX)[1])
    return torch.cat(pieces).reshape(labels.shape) if pieces else labels.float()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the negative log-likelihoods; the gradients are formed in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, dtype: torch.dtype
    ) -> Tensor:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        working = weight.to(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and need_bias else None
        step = _chunks(hidden.shape[0], weight.shape[0])
        for start in range(0, hidden.shape[0], step):
            rows, target = hidden[start : start + step].to(dtype), labels[start : start + step]
            kept = target != IGNORE_INDEX
            logits = torch.nn.functional.linear(rows, working, None if bias is None else bias.to(dtype)).to(wide)
            normaliser, nll = _nll(logits, target, kept)
            total += nll.sum()
            if not (need_hidden or need_weight or need_bias):
                continue
            # d nll / d logits = softmax − onehot, zero where ignored; formed in place.
            slope = logits.sub_(normaliser.unsqueeze(-1)).exp_()
            slope.scatter_add_(-1, target.clamp(min=0).unsqueeze(-1), slope.new_full((len(target), 1), -1.0))
            slope.masked_fill_(~kept.unsqueeze(-1), 0.0)
            narrow = slope.to(dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + step] = narrow @ working
            if grad_weight is not None:
                grad_weight += narrow.T @ rows
            if grad_bias is not None:
                grad_bias += slope.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grads = [
            None if grad is None else (grad * grad_total).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None)


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Mean cross entropy of a linear head: (1/n) Σ_t [logsumexp(W h_t + b) − (W h_t + b)[label_t]].

    Logits exist for one chunk of tokens at a time (at most 4 million numbers); their gradient is formed in the forward
    pass, so that backward only scales it. Under autocast the products run in the autocast dtype, softmax in float32.

    Args:
        hidden: `[..., D]` last hidden states.
        weight: `[V, D]` of the head; may be the tied embedding.
        labels: `[...]` int64, aligned: `labels[t]` is what position t must predict; −100 is ignored.
        bias: `[V]` or None.
        num_items: the divisor n; None counts the labels that are not −100. With gradient accumulation pass the count
            over all accumulated batches.

    Returns:
        Scalar float32 (float64 for float64 input). 0 when every label is ignored.

    Cost: 3 matrix products of N·V·D (1 without gradients); memory O(chunk·V + V·D).
    """
    _check(hidden, weight, labels)
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    with torch.autocast(device, enabled=False):
        total = _ChunkedCrossEntropy.apply(flat, weight, bias, targets, dtype)
    if num_items is None:
        num_items = (targets != IGNORE_INDEX).sum().clamp(min=1)
    return total / num_items
