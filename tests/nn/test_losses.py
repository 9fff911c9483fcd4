"""The chunked cross entropy is the plain one, with gradients, and never holds all logits."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from farspan.errors import ConfigError, ShapeError
from farspan.nn import losses
from farspan.nn.losses import (
    chunked_cross_entropy,
    classification_loss,
    head_cross_entropy,
    scored_share,
    token_nll,
)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_elements", [1, 40, 1 << 22])
def test_equals_plain_cross_entropy(bias: bool, chunk_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", {False: chunk_elements})
    hidden = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(11, dtype=torch.float64, requires_grad=True) if bias else None
    leaves = [x for x in (hidden, weight, offset) if x is not None]
    labels = torch.randint(0, 11, (2, 7))
    labels[0, :3] = -100
    plain = cross_entropy(torch.nn.functional.linear(hidden, weight, offset).reshape(-1, 11), labels.reshape(-1))
    ours = chunked_cross_entropy(hidden, weight, labels, offset)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(torch.autograd.grad(3 * ours, leaves), torch.autograd.grad(3 * plain, leaves), strict=True):
        torch.testing.assert_close(a, b)
    nll = token_nll(hidden, weight, labels, offset)
    assert (nll[labels == -100] == 0).all()
    torch.testing.assert_close(nll.sum().double() / (labels != -100).sum(), plain.detach(), atol=1e-5, rtol=1e-5)


def test_a_head_with_a_hook_is_called() -> None:
    head, hidden, labels = torch.nn.Linear(4, 9), torch.randn(6, 4, requires_grad=True), torch.randint(0, 9, (6,))
    want, calls = head_cross_entropy(hidden, head, labels), []
    head.register_full_backward_hook(lambda *_: calls.append(1))
    found = head_cross_entropy(hidden, head, labels)
    found.backward()
    torch.testing.assert_close(found, want)
    assert calls == [1]


def test_num_items_replaces_the_count() -> None:
    hidden, weight, labels = torch.randn(6, 4), torch.randn(9, 4), torch.randint(0, 9, (6,))
    mean = chunked_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(chunked_cross_entropy(hidden, weight, labels, num_items=24), mean * 6 / 24)
    assert chunked_cross_entropy(hidden, weight, torch.full((6,), -100)) == 0


def test_gradients_are_formed_only_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    node, needs = losses.head_loss_node, []

    def spy(*arguments: object) -> tuple[torch.Tensor, ...]:
        needs.append(arguments[-1])
        return node(*arguments)

    monkeypatch.setattr(losses, "head_loss_node", spy)
    weight, labels = torch.randn(9, 4, requires_grad=True), torch.randint(0, 9, (6,))
    for trains in (True, False):
        with torch.set_grad_enabled(trains):
            chunked_cross_entropy(torch.randn(6, 4), weight, labels)
    assert needs == [[False, True, False], [False, False, False]]


def test_a_second_derivative_is_refused() -> None:
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4)
    loss = chunked_cross_entropy(hidden, weight, torch.randint(0, 9, (6,)))
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (loss + gradient.square().sum()).backward()


def test_shapes_are_checked() -> None:
    with pytest.raises(ShapeError, match=r"labels"):
        chunked_cross_entropy(torch.randn(6, 4), torch.randn(9, 4), torch.zeros(5, dtype=torch.long))
    with pytest.raises(ShapeError, match=r"weight \[V, D\]"):
        token_nll(torch.randn(6, 4), torch.randn(9, 3), torch.zeros(6, dtype=torch.long))


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification", "regression"])
def test_losses_of_classifiers_are_means_over_any_leading_shape(problem_type: str) -> None:
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    if problem_type == "single_label_classification":
        labels = torch.tensor([[0, -100, 3], [1, 2, -100]])
        log_p = logits.log_softmax(-1)
        want = -torch.stack([log_p[0, 0, 0], log_p[0, 2, 3], log_p[1, 0, 1], log_p[1, 1, 2]]).sum()
        scored = 4
    else:
        labels = torch.rand(2, 3, 4, dtype=torch.float64).round()
        p = logits.sigmoid()
        if problem_type == "regression":
            want = (logits - labels).square().sum()
        else:
            want = -(labels * p.log() + (1 - labels) * (1 - p).log()).sum()
        scored = 24
    torch.testing.assert_close(classification_loss(logits, labels, problem_type), want / scored)
    torch.testing.assert_close(classification_loss(logits, labels, problem_type, num_items=7), want / 7)


@pytest.mark.parametrize("wrong", [2, -100, -0.5])
def test_several_labels_are_zero_to_one(wrong: float) -> None:
    with pytest.raises(ShapeError, match=f"labels hold {wrong}; multi_label_classification expects 0 or 1"):
        classification_loss(torch.zeros(1, 3), torch.tensor([[0, 1, wrong]]), "multi_label_classification")


def test_unknown_problem_type() -> None:
    with pytest.raises(ConfigError, match="did you mean 'regression'"):
        classification_loss(torch.zeros(2, 1), torch.zeros(2), "regresion")


def test_share_of_a_micro_batch() -> None:
    labels = torch.tensor([1, -100, 2])
    assert scored_share(labels, None) == 1
    assert scored_share(labels, 8) == 0.25
