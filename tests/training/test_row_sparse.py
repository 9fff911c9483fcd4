"""Each row of a row-sparse table is an AdamW of its own, and a run with such tables resumes to the same digits."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from farspan.errors import ConfigError
from farspan.training import loop, row_sparse
from farspan.training.loop import train
from farspan.training.optimizer import build_optimizer
from farspan.training.recipe import Recipe, TrainRecipe
from farspan.training.row_sparse import RowSparseAdamW

OPTIONS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.3}


def gradients(steps: int, rows: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """`[steps, rows, width]`; half of the rows of a step have none, row 0 never has one, row 1 always."""
    touched = torch.rand(steps, rows, 1) < 0.5
    touched[:, 0], touched[:, 1] = False, True
    return torch.where(touched, torch.randn(steps, rows, width, dtype=dtype), 0.0)


def optimised(start: Tensor, gradients: Tensor, kind: type[torch.optim.AdamW], **group: Any) -> tuple[Tensor, Any]:
    table = nn.Parameter(start.clone())
    optimizer = kind([{"params": [table], **group}], **OPTIONS)
    for gradient in gradients:
        table.grad = gradient.clone()
        optimizer.step()
    return table.detach(), optimizer.state[table]


def test_each_row_moves_as_under_adamw_over_the_steps_that_touched_it() -> None:
    start, sequence = torch.randn(9, 5, dtype=torch.float64), gradients(40, 9, 5)
    table, state = optimised(start, sequence, RowSparseAdamW, row_sparse=True)
    for row in range(9):
        own = sequence[:, row][sequence[:, row].any(-1)]
        want, moments = optimised(start[row], own, torch.optim.AdamW)
        torch.testing.assert_close(table[row], want, rtol=1e-12, atol=1e-14)
        assert int(state["step"][row]) == len(own)
        for name in ("exp_avg", "exp_avg_sq") if len(own) else ():
            torch.testing.assert_close(state[name][row], moments[name], rtol=1e-12, atol=1e-14)
    assert torch.equal(table[0], start[0]) and len(sequence) == int(state["step"][1])


def table_and_weight() -> tuple[nn.Parameter, nn.Parameter, RowSparseAdamW]:
    table, weight = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(2))
    return table, weight, RowSparseAdamW([{"params": [table], "row_sparse": True}, {"params": [weight]}], **OPTIONS)


def test_a_scaled_loss_moves_tables_as_the_loss_itself_and_an_overflow_moves_nothing() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    table, weight, optimizer = table_and_weight()
    scaler.scale(table[0].sum() + weight.sum() * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not table.any() and not weight.any()
    optimizer.zero_grad()
    scaler.scale(1e-8 * (table[0].sum() + weight.sum())).backward()  # as small as eps, which a factor would show
    scaler.step(optimizer)
    torch.testing.assert_close(table[0].detach(), torch.full((2,), -0.005))
    torch.testing.assert_close(weight.detach(), table[0].detach())


def test_a_step_is_announced_once_and_a_failed_one_keeps_the_gradients() -> None:
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # whose class PyTorch then wraps
    table, weight, optimizer = table_and_weight()
    announced = []
    optimizer.register_step_post_hook(lambda *_: announced.append(1))
    table.grad, weight.grad = torch.ones(3, 2), torch.ones(2)
    optimizer.step()
    assert announced == [1]
    optimizer.param_groups[1]["lr"] = torch.ones(2)  # no scalar
    with pytest.raises((RuntimeError, ValueError)):
        optimizer.step()
    assert table.grad is not None and table.grad.all()


def test_a_table_that_every_step_touches_moves_as_under_adamw() -> None:
    start, sequence = torch.randn(6, 4), torch.randn(30, 6, 4)
    (found, _), (want, _) = (
        optimised(start, sequence, kind, row_sparse=True) for kind in (RowSparseAdamW, torch.optim.AdamW)
    )
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


def test_groups_without_the_mark_are_adamw_to_the_bit() -> None:
    start, sequence = torch.randn(6, 4), gradients(5, 6, 4, torch.float32)
    table, dense = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = RowSparseAdamW([{"params": [table], "row_sparse": True}, {"params": [dense]}], **OPTIONS)
    for gradient in sequence:
        table.grad, dense.grad = gradient.clone(), gradient.clone()
        loss = optimizer.step(lambda: 7.0)
        assert loss == 7.0 and torch.equal(table.grad, gradient) and torch.equal(dense.grad, gradient)
    assert torch.equal(dense.detach(), optimised_dense(start, sequence))
    assert torch.equal(table[0], start[0]) and not torch.equal(dense[0], start[0])


def optimised_dense(start: Tensor, sequence: Tensor) -> Tensor:
    table = nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([table], **OPTIONS, fused=True)
    for gradient in sequence:
        table.grad = gradient.clone()
        optimizer.step()
    return table.detach()


def test_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    start, sequence = torch.randn(30, 4), gradients(4, 30, 4, torch.float32)
    whole, _ = optimised(start, sequence, RowSparseAdamW, row_sparse=True)
    monkeypatch.setattr(row_sparse, "PART", 12)
    assert torch.equal(whole, optimised(start, sequence, RowSparseAdamW, row_sparse=True)[0])


@pytest.mark.parametrize("shape", [(0, 4), (5, 0)])
def test_empty_tables_pass(shape: tuple[int, int]) -> None:
    optimised(torch.zeros(shape), torch.zeros(2, *shape), RowSparseAdamW, row_sparse=True)


def test_what_has_no_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"row_sparse: a parameter of shape \[3\] has no rows of its own; accepted"):
        RowSparseAdamW([{"params": [nn.Parameter(torch.zeros(3))], "row_sparse": True}])


def model(feed_forward: str) -> nn.Module:
    from farspan.models import FarspanConfig, FarspanForCausalLM

    options = {"peer": {"num_experts": 4, "num_experts_per_tok": 1}} if feed_forward == "peer" else {}
    return FarspanForCausalLM(
        FarspanConfig(
            vocab_size=16,
            hidden_size=16,
            num_attention_heads=2,
            num_hidden_layers=1,
            mixers=["softmax"],
            feed_forwards=[feed_forward],
            feed_forward_options=options,
        )
    )


def test_the_recipe_names_the_tables() -> None:
    peer = model("peer")
    names = {id(parameter): name for name, parameter in peer.named_parameters()}
    for choice, wanted in (("experts", {"down", "up"}), ("all", {"down", "up", "weight"})):
        optimizer = build_optimizer(peer, TrainRecipe(max_steps=1, row_sparse=choice))  # type: ignore[arg-type]
        marked = [g for g in optimizer.param_groups if g["row_sparse"]]
        assert {names[id(p)].split(".")[-1] for g in marked for p in g["params"]} == wanted
        assert sum(len(g["params"]) for g in optimizer.param_groups) == len(names)
        assert {g["weight_decay"] for g in marked for p in g["params"] if "experts" in names[id(p)]} == {0.0}
    assert type(build_optimizer(peer, TrainRecipe(max_steps=1))) is torch.optim.AdamW


def test_a_model_without_such_tables_says_so() -> None:
    with pytest.raises(ConfigError, match=r"train\.row_sparse='experts': this model has no such tables"):
        build_optimizer(model("gated_mlp"), TrainRecipe(max_steps=1, row_sparse="experts"))


class Crash(BaseException):
    """Stands for the death of the process."""


def test_a_run_resumes_to_the_same_digits(
    tiny: Callable[..., Recipe],
    history: Callable[[Path], list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sections: dict[str, Any] = {
        "model": {"feed_forwards": ["peer"], "feed_forward_options": {"peer": {"num_experts": 400}}},
        "train": {"max_steps": 6, "row_sparse": "all"},
        "evaluation": {"eval_steps": 0},
    }
    whole, cut = tiny("whole", **sections), tiny("cut", **sections)
    train(whole)
    original = loop.optimizer_step

    def dies(*args: Any, **kwargs: Any) -> Any:
        if kwargs["step"] == 5:
            raise Crash
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", dies)
        with pytest.raises(Crash):
            train(cut)
    train(cut)
    assert history(cut.run_dir) == history(whole.run_dir)


def _sharded_rank(rank: int, directory: str) -> None:
    """Steps a table that is cut by rows over two ranks, and saves the rows of all."""
    store = dist.FileStore(f"{directory}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        torch.manual_seed(0)
        start, sequence = torch.randn(5, 4, dtype=torch.float64), gradients(6, 5, 4)
        table = nn.Parameter(distribute_tensor(start, mesh, [Shard(0)]))
        optimizer = RowSparseAdamW([{"params": [table], "row_sparse": True}], **OPTIONS)
        for gradient in sequence:
            table.grad = distribute_tensor(gradient, mesh, [Shard(0)])
            optimizer.step()
        found = {"table": table, **optimizer.state[table]}
        whole = {name: x.full_tensor().detach() for name, x in found.items()}
        if rank == 0:
            torch.save(whole, f"{directory}/found.pt")
    finally:
        dist.destroy_process_group()
    os._exit(0)  # PyTorch's own threads may abort a process that takes its time to end


@pytest.mark.slow
def test_a_table_that_is_cut_over_ranks_moves_as_the_whole_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_sharded_rank, args=(str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    start, sequence = torch.randn(5, 4, dtype=torch.float64), gradients(6, 5, 4)
    table, state = optimised(start, sequence, RowSparseAdamW, row_sparse=True)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for name, x in {"table": table, **state}.items():
        assert torch.equal(found[name], x), name
