"""How a model is made ready to train: its blocks under torch.compile."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from farspan.training.setup import compile_model, recompute_activations
from tests import tolerances
from tests.models.conftest import tiny
from tests.ops.checks import assert_close


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def step(model: nn.Module) -> dict[str, Tensor]:
    """The loss of one row of tokens, and the gradients."""
    ids = torch.randint(1, 61, (1, 20), generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, output_logits=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at every input of a graph
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("mixers", [["metala"] * 3, ["softmax", "cosine"] * 2])
def test_blocks_of_a_kind_share_a_graph(mixers: list[str], checkpointed: bool) -> None:
    model = tiny("softmax", mixers=mixers, num_hidden_layers=len(mixers)).train()
    if checkpointed:
        recompute_activations(model)
    want, counter = step(model), CompileCounterWithBackend("aot_eager")
    compile_model(model, backend=counter)
    got = step(model)
    assert counter.frame_count == len(set(mixers))
    assert got.keys() == want.keys()
    for name, ours in got.items():
        assert_close(ours, want[name], tolerances.FLOAT32, name)


def test_a_model_without_blocks_is_compiled_as_a_whole() -> None:
    class Stranger(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    model, counter = Stranger(), CompileCounterWithBackend("eager")
    compile_model(model, backend=counter)
    model(torch.zeros(1, 3))
    assert counter.frame_count == 1
