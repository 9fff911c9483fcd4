"""Feed-forwards with experts in the stack: training with their loss, padding, packing, generation, conversion."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from farspan import FarspanConfig, FarspanForCausalLM
from farspan.errors import ConfigError
from farspan.models.convert.experts import (
    cdmoe_entries,
    mlp_entries,
    peer_entries,
    seimoe_entries,
)
from farspan.models.convert.names import Entry, to_ours, to_published

RETRIEVAL = {"num_experts": 16, "num_experts_per_tok": 3, "router_aux_loss_coef": 0.1}
STACKS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "cdmoe": (["cdmoe"], {"cdmoe": RETRIEVAL}),
    "cdmoe_query_key": (["cdmoe"], {"cdmoe": {**RETRIEVAL, "router": "query_key", "num_expert_heads": 2}}),
    "peer": (["peer"], {"peer": {**RETRIEVAL, "num_expert_heads": 2}}),
    "seimoe": (["seimoe"], {"seimoe": {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1}}),
    "mixed": (["mlp", "cdmoe", "peer", "seimoe"], {"cdmoe": RETRIEVAL, "peer": RETRIEVAL}),
}


@pytest.fixture(params=sorted(STACKS))
def stack(request: pytest.FixtureRequest) -> str:
    return request.param


def tiny(stack: str, **overrides: Any) -> FarspanForCausalLM:
    torch.manual_seed(0)
    feed_forwards, options = STACKS[stack]
    fields = {
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "mixers": ["softmax", "metala"],
        "feed_forwards": feed_forwards,
        "feed_forward_options": options,
        "num_hidden_layers": 4,
        "initializer_range": 0.2,
    }
    model = FarspanForCausalLM(FarspanConfig(**{**fields, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.5)
    return model


def _ids(rows: int, length: int) -> Tensor:
    return torch.randint(1, 61, (rows, length), generator=torch.Generator().manual_seed(4))


def test_training_learns_and_adds_the_auxiliary_loss(stack: str) -> None:
    model, ids = tiny(stack).train(), _ids(2, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    losses = []
    for _ in range(25):
        out = model(ids, labels=ids)
        plain = cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.testing.assert_close(out.loss, plain + out.aux_loss)
        records = [record for record in out.auxiliary if record is not None]
        torch.testing.assert_close(out.aux_loss, sum(r.loss for r in records if r.loss is not None))
        assert len(out.auxiliary) == 4 and all(0 < r.statistics["experts_used"] <= 1 for r in records)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(plain.item())
    assert losses[-1] < 0.5 * losses[0]


def test_evaluation_has_the_plain_loss(stack: str) -> None:
    model, ids = tiny(stack), _ids(2, 12)
    out = model(ids, labels=ids)
    assert out.aux_loss is None and out.auxiliary is None
    torch.testing.assert_close(out.loss, cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def test_auxiliary_loss_alone_reaches_the_router(stack: str) -> None:
    model = tiny(stack).train()
    model(_ids(2, 12)).aux_loss.backward()
    reached = [name for name, p in model.named_parameters() if "router" in name and p.grad is not None and p.grad.any()]
    assert reached


def test_every_parameter_has_a_gradient(stack: str) -> None:
    model, ids = tiny(stack).train(), _ids(4, 24)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_micro_batches_sum_to_one_batch(stack: str) -> None:
    """Each micro-batch brings the auxiliary loss of its tokens, weighted by its labels."""
    model, ids = tiny(stack).train(), _ids(4, 12)
    labels = ids.clone()
    labels[0, :7] = -100
    counts = [(part[:, 1:] != -100).sum() for part in labels.split(2)]
    total = torch.stack(counts).sum()
    parts = [model(x, labels=y, num_items_in_batch=total) for x, y in zip(ids.split(2), labels.split(2), strict=True)]
    nll = [out.loss - out.aux_loss * n / total for out, n in zip(parts, counts, strict=True)]
    whole = model(ids, labels=labels)
    torch.testing.assert_close(torch.stack(nll).sum(), whole.loss - whole.aux_loss)


@pytest.mark.parametrize("mask_row", ["000011111111", "111111110000", "001101110111"])
def test_padding_changes_neither_logits_nor_loss(stack: str, mask_row: str) -> None:
    model, ids = tiny(stack).train(), _ids(1, 12)
    mask = torch.tensor([[int(c) for c in mask_row]])
    real = mask.bool()[0]
    padded, alone = model(ids, attention_mask=mask), model(ids[:, real])
    torch.testing.assert_close(padded.logits[:, real], alone.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(padded.aux_loss, alone.aux_loss, atol=1e-6, rtol=1e-5)
    for got, want in zip(padded.auxiliary, alone.auxiliary, strict=True):
        if want is not None:
            torch.testing.assert_close(got.load, want.load)
            torch.testing.assert_close(got.statistics, want.statistics, atol=1e-5, rtol=1e-5)


def test_packed_documents_equal_separate_ones(stack: str) -> None:
    model, ids = tiny(stack), _ids(1, 17)
    with torch.no_grad():
        packed = model(ids, cu_seqlens=torch.tensor([0, 5, 17], dtype=torch.int32)).logits
        separate = torch.cat([model(ids[:, :5]).logits, model(ids[:, 5:]).logits], dim=1)
    torch.testing.assert_close(packed, separate, atol=1e-5, rtol=1e-4)


def test_future_does_not_change_past(stack: str) -> None:
    model, ids = tiny(stack).double(), _ids(1, 20)
    other = ids.clone()
    other[0, 12:] = 3
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[:, :12], model(other).logits[:, :12], atol=1e-12, rtol=0)


def test_generation_with_cache_equals_without(stack: str) -> None:
    model, ids = tiny(stack), _ids(2, 6)
    plain, cached = (
        model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=use_cache) for use_cache in (False, True)
    )
    assert torch.equal(plain, cached)


def test_save_and_load(stack: str, tmp_path: Any) -> None:
    model, ids = tiny(stack), _ids(1, 9)
    model.save_pretrained(tmp_path)
    again = FarspanForCausalLM.from_pretrained(tmp_path).eval()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    with torch.no_grad():  # a loaded weight may be aligned otherwise, which moves the last bit of a small product
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_changes_nothing(stack: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model = tiny(stack).train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(_ids(2, 12), labels=_ids(2, 12)).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_autocast_runs_close_to_float32(stack: str) -> None:
    model, ids = tiny(stack, initializer_range=0.05).train(), _ids(2, 12)
    plain = model(ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(ids, labels=ids).loss
    rounded.backward()
    torch.testing.assert_close(rounded, plain, atol=2e-2, rtol=1e-2)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_bfloat16_model_runs(stack: str) -> None:
    model, ids = tiny(stack).bfloat16().train(), _ids(2, 12)
    out = model(ids, labels=ids)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16 and out.loss.isfinite()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # raised inside Dynamo at a graph break
@pytest.mark.parametrize("stack", ["cdmoe", "seimoe"])
def test_compiled_equals_eager(stack: str) -> None:
    model, ids = tiny(stack, mixers=["softmax"], num_hidden_layers=1).train(), _ids(2, 16)
    # The rows of each routed MLP are a value of the data, which breaks the graph; retrieval does not.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=stack == "cdmoe")
    got, want = compiled(ids, labels=ids), model(ids, labels=ids)
    torch.testing.assert_close(got.logits, want.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.loss, want.loss)
    ours, theirs = (torch.autograd.grad(out.loss, list(model.parameters())) for out in (got, want))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


def test_operations_are_counted_in_the_model() -> None:
    dense = tiny("cdmoe", feed_forwards=["gated_mlp"], feed_forward_options={}).flops_per_token(64)
    experts = 2 * 2 * 3 * 24 + 2 * 2 * 24 * 4  # dot product and sum of three experts, and the gate
    assert tiny("cdmoe").flops_per_token(64) == dense + 4 * experts


@pytest.mark.parametrize(
    ("stack", "entries"),
    [
        ("cdmoe", cdmoe_entries("gate")),
        ("cdmoe_query_key", cdmoe_entries("query_key")),
        ("peer", peer_entries()),
        ("seimoe", seimoe_entries(4)),
    ],
)
def test_names_convert_both_ways(stack: str, entries: list[Entry]) -> None:
    ours = tiny(stack).model.blocks[0].feed_forward.state_dict()
    again = to_ours(to_published(ours, entries), entries)
    assert again.keys() == ours.keys() and all(torch.equal(again[name], ours[name]) for name in ours)


def test_biases_and_norms_are_named() -> None:
    assert {entry.published for entry in cdmoe_entries("gate", bias=True)} >= {"up_proj.bias", "gate_proj.bias"}
    assert "norm.gamma" in {entry.published for entry in peer_entries(pre_norm=True)}
    assert [entry.ours for entry in mlp_entries(bias=False)] == ["up_proj.weight", "down_proj.weight"]


def test_unreachable_experts_are_held_and_take_part_in_nothing() -> None:
    options = {"num_experts": 16, "num_experts_per_tok": 3, "unreachable_experts": 4}
    config = FarspanConfig(
        vocab_size=31, hidden_size=16, num_attention_heads=2, num_hidden_layers=1, feed_forwards=["cdmoe"],
        feed_forward_options={"cdmoe": options},
    )  # fmt: skip
    model, ids = FarspanForCausalLM(config).eval(), torch.arange(12).unsqueeze(0)
    experts, before = model.model.blocks[0].feed_forward.experts, model(ids).logits
    assert experts.down.shape == experts.up.shape == (20, 16)
    with torch.no_grad():
        experts.down[16:] = experts.up[16:] = 100.0
    assert model(ids).logits.equal(before)
    with pytest.raises(ConfigError, match="unreachable_experts=-1"):
        FarspanConfig(feed_forwards=["cdmoe"], feed_forward_options={"cdmoe": {"unreachable_experts": -1}})
