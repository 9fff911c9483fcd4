"""A whole model under torch.compile: one graph forward, one backward, the same loss and gradients."""

import pytest
import torch

from farspan import FarspanConfig, FarspanForCausalLM
from tests import tolerances
from tests.ops.checks import assert_close

LAYERS = ["softmax", "metala", "cosine", "ssd"]
WITH_PADDING = ["cosine", "ssd"]


@pytest.mark.parametrize(("mixers", "padded"), [(LAYERS, False), (WITH_PADDING, True)], ids=["whole", "padded"])
def test_a_model_is_one_graph(mixers: list[str], padded: bool) -> None:
    config = FarspanConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=len(mixers),
        num_attention_heads=2,
        intermediate_size=48,
        mixers=mixers,
    )
    model = FarspanForCausalLM(config)
    tokens = torch.randint(0, 50, (2, 40))
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        mask_or_none = mask if padded else None
        return model(input_ids=tokens, attention_mask=mask_or_none, labels=tokens, use_cache=False).loss

    torch._dynamo.reset()
    want = torch.autograd.grad(loss(tokens), list(model.parameters()))
    got = torch.autograd.grad(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(tokens), list(model.parameters())
    )
    for (name, _), ours, theirs in zip(model.named_parameters(), got, want, strict=True):
        assert_close(ours, theirs, tolerances.FLOAT32, name)
