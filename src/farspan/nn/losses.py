"""Losses: cross entropy of a language-model head that never holds all logits at once, and losses of classifiers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from farspan.errors import ConfigError, ShapeError, nearest
from farspan.nn.plain import is_plain
from farspan.ops._contract import plain_backward
from farspan.ops._library import register_node
from farspan.ops.cross_entropy.api import cross_entropy_in_place

IGNORE_INDEX = -100
# Logits that exist at once: 16 MiB in float32 on a CPU; on a GPU products that are large enough for its full speed.
_CHUNK_ELEMENTS = {False: 1 << 22, True: 1 << 27}
# A GPU multiplies rows that begin at multiples of so many numbers several times as fast as others.
_ALIGNED = 64


def _chunks(tokens: int, head: Tensor) -> int:
    return max(1, min(tokens, _CHUNK_ELEMENTS[head.is_cuda] // max(len(head), 1)))


def _check(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != weight.shape[-1]:
        raise ShapeError(
            f"hidden [..., D]={list(hidden.shape)}, weight [V, D]={list(weight.shape)} and labels "
            f"[...]={list(labels.shape)} do not fit: labels need hidden's leading shape and weight its last dimension."
        )
    _check_classes(labels, weight.shape[0], "token ids")


def _check_classes(labels: Tensor, classes: int, what: str) -> None:
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ShapeError(f"labels are {labels.dtype}; give {what} as int64, {IGNORE_INDEX} where none is scored.")
    # Reads a value from the device: once per call, beside all the work that led to the loss.
    if not torch.compiler.is_compiling() and labels.numel():
        wrong = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= classes))
        if bool(wrong.any()):
            raise ShapeError(
                f"labels hold {int(labels[wrong][0])}; accepted are {what} 0 to {classes - 1}, and {IGNORE_INDEX} "
                "where nothing is scored."
            )


def token_nll(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of each label: nll_t = logsumexp(W h_t + b) − (W h_t + b)[label_t]. No gradient.

    Args:
        hidden: `[..., D]` last hidden states.
        weight: `[V, D]` of the head.
        labels: `[...]` int64, aligned: `labels[t]` is what position t must predict; −100 is ignored.
        bias: `[V]` or None.

    Returns:
        `[...]` float32 in nats, 0 at ignored labels.

    Cost: O(N·V·D) time, memory for at most 4 million logits (134 million on a GPU).
    """
    _check(hidden, weight, labels)
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    pieces = []
    with torch.no_grad():
        step = _chunks(len(flat), weight)
        for rows, target in zip(flat.split(step), targets.split(step), strict=True):
            logits = torch.nn.functional.linear(rows, weight, bias)
            pieces.append(cross_entropy_in_place(logits, target, slope=False))
    return torch.cat(pieces).reshape(labels.shape) if pieces else labels.float()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the negative log-likelihoods; the gradients are formed in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, dtype: torch.dtype, trains: bool
    ) -> Tensor:
        needs = [trains and need for need in ctx.needs_input_grad[:3]]
        total, *grads = head_loss_node(hidden, weight, bias, labels, dtype, needs)
        ctx.save_for_backward(*(grad if need else None for grad, need in zip(grads, needs, strict=True)))
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grads = [
            None if grad is None else (grad * grad_total).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None, None)


def _head_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, dtype: torch.dtype, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of the negative log-likelihoods, and the gradients that are needed; the others are empty."""
    total, grad_hidden, grad_weight, grad_bias = _room(hidden, weight, bias, labels, dtype, needs)
    for grad in (total, grad_weight, grad_bias):
        grad.zero_()
    head, offset = _aligned(weight.to(dtype)), None if bias is None else _aligned(bias.to(dtype))
    classes, step = len(weight), _chunks(len(hidden), weight)
    for start in range(0, len(hidden), step):
        rows, target = hidden[start : start + step].to(dtype), labels[start : start + step]
        slope = torch.nn.functional.linear(rows, head, offset)
        total += cross_entropy_in_place(slope, target, classes=classes, slope=any(needs)).sum()
        if needs[0]:
            grad_hidden[start : start + step] = slope @ head
        if needs[1]:
            grad_weight += (slope.T @ rows)[:classes]
        if needs[2]:
            grad_bias += slope.sum(0, dtype=grad_bias.dtype)[:classes]
    return total, grad_hidden, grad_weight, grad_bias


def _aligned(x: Tensor) -> Tensor:
    """`[V, …]`, on a GPU with zeros behind it."""
    more = -len(x) % _ALIGNED if x.is_cuda else 0
    return torch.cat((x, x.new_zeros(more, *x.shape[1:]))) if more else x


def _room(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, dtype: torch.dtype, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def room(like: Tensor, kind: torch.dtype, need: bool) -> Tensor:
        return torch.empty(like.shape if need else (0,), dtype=kind, device=hidden.device)

    grads = room(hidden, hidden.dtype, needs[0]), room(weight, wide, needs[1]), room(weight[:, 0], wide, needs[2])
    return hidden.new_empty((), dtype=wide), *grads


head_loss_node = register_node(
    "head_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, ScalarType dtype, bool[] needs) -> "
    "(Tensor total, Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
    _head_loss,
    _room,
)


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Mean cross entropy of a linear head: (1/n) Σ_t [logsumexp(W h_t + b) − (W h_t + b)[label_t]].

    Logits exist for one chunk of tokens at a time (at most 4 million numbers, on a GPU 134 million); their gradient is
    formed in the forward pass, so that backward only scales it. Under autocast the products run in the autocast dtype,
    softmax in float32.

    Args:
        hidden: `[..., D]` last hidden states.
        weight: `[V, D]` of the head; may be the tied embedding.
        labels: `[...]` int64, aligned: `labels[t]` is what position t must predict; −100 is ignored.
        bias: `[V]` or None.
        num_items: the divisor n; None counts the labels that are not −100. With gradient accumulation pass the count
            over all accumulated batches; where that is 0, nothing is scored, and 1 divides.

    Returns:
        Scalar float32 (float64 for float64 input). 0 when every label is ignored.

    Cost: 3 matrix products of N·V·D (1 without gradients); memory O(chunk·V + V·D).
    """
    _check(hidden, weight, labels)
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    with torch.autocast(device, enabled=False):
        total = _ChunkedCrossEntropy.apply(flat, weight, bias, targets, dtype, torch.is_grad_enabled())
    return total / (_scored(targets).clamp(min=1) if num_items is None else _divisor(num_items))


def head_cross_entropy(
    hidden: Tensor, head: torch.nn.Linear, labels: Tensor, num_items: int | Tensor | None = None
) -> Tensor:
    """`chunked_cross_entropy` of a head; one that has to be called, as it is adapted or offloaded, forms all logits.

    Args:
        hidden: `[..., D]` last hidden states.
        head: the linear layer.
        labels, num_items: as in `chunked_cross_entropy`.
    """
    if is_plain(head):
        return chunked_cross_entropy(hidden, head.weight, labels, bias=head.bias, num_items=num_items)
    return classification_loss(head(hidden), labels, "single_label_classification", num_items)


def classification_loss(
    logits: Tensor, labels: Tensor, problem_type: str, num_items: int | Tensor | None = None
) -> Tensor:
    """Mean loss of the logits of a classifier, in the three forms of transformers.

    - `single_label_classification`: cross entropy, (1/n) Σ_i [logsumexp(z_i) − z_i[label_i]];
    - `multi_label_classification`: binary cross entropy of each label by itself;
    - `regression`: squared error.

    Args:
        logits: `[..., L]`, one number for each of L labels.
        labels: `[...]` int64, the class of each row, −100 is ignored; or `[..., L]` (`[...]` too if L = 1) numbers for
            the other two forms: 0 or 1, or the targets. Nothing is broadcast.
        problem_type: one of the three.
        num_items: the divisor n; None counts the labels that are scored.

    Returns:
        Scalar float32 (float64 for float64 input).

    Raises:
        ShapeError: for labels of another shape, classes that do not exist, and several labels that are not in [0, 1].
        ConfigError: for an unknown problem type.
    """
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    classes = logits.shape[-1]
    count: int | Tensor
    if problem_type == "single_label_classification":
        _check_shape(labels, logits.shape[:-1], problem_type)
        _check_classes(labels, classes, "classes")
        rows, targets = wide.reshape(-1, classes), labels.reshape(-1).long()
        total = torch.nn.functional.cross_entropy(rows, targets, ignore_index=IGNORE_INDEX, reduction="sum")
        count = _scored(targets).clamp(min=1)
    elif problem_type in _ELEMENTWISE:
        if classes == 1 and labels.shape == logits.shape[:-1]:
            labels = labels.unsqueeze(-1)
        _check_shape(labels, logits.shape, problem_type)
        if problem_type == "multi_label_classification" and not torch.compiler.is_compiling():
            wrong = (labels < 0) | (labels > 1)
            if bool(wrong.any()):
                raise ShapeError(
                    f"labels hold {labels[wrong][0].item()}; {problem_type} expects 0 or 1 for each label."
                )
        total = _ELEMENTWISE[problem_type](wide, labels.to(wide.dtype), reduction="sum")
        count = max(labels.numel(), 1)
    else:
        accepted = ("single_label_classification", *_ELEMENTWISE)
        raise ConfigError(f"Unknown problem_type {problem_type!r}: {nearest(problem_type, accepted)}")
    return total / (count if num_items is None else _divisor(num_items))


_ELEMENTWISE: dict[str, Callable[..., Tensor]] = {
    "multi_label_classification": torch.nn.functional.binary_cross_entropy_with_logits,
    "regression": torch.nn.functional.mse_loss,
}


def _check_shape(labels: Tensor, expected: torch.Size, problem_type: str) -> None:
    if labels.shape != expected:
        raise ShapeError(
            f"labels have shape {list(labels.shape)}; {problem_type} expects {list(expected)}. They are "
            f"{labels.dtype}: where config.problem_type is not set, integers are classes, floats several labels."
        )


def scored_share(labels: Tensor, num_items: int | Tensor | None) -> Tensor | float:
    """The weight of a micro-batch's other losses: its share of the `num_items` labels of the whole batch.

    Losses that are means over a micro-batch then add up to about one batch's, as the sum of cross entropies does.

    Args:
        labels: of this micro-batch; −100 is not scored.
        num_items: labels of all micro-batches; None has one micro-batch, of weight 1.
    """
    return 1.0 if num_items is None else _scored(labels) / _divisor(num_items)


def _scored(labels: Tensor) -> Tensor:
    """How many labels are scored."""
    return (labels != IGNORE_INDEX).sum()


def _divisor(num_items: int | Tensor) -> int | Tensor:
    """The number of labels of a whole batch, at least 1: the sum over none of them is 0, and so is its mean."""
    if isinstance(num_items, Tensor):
        return num_items.clamp(min=1)
    if num_items < 0:
        raise ConfigError(f"num_items_in_batch={num_items} is not accepted; accepted are counts of labels, from 0.")
    return max(num_items, 1)
