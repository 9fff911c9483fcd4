"""Feed-forwards with experts: their formulas, routers, balance, statistics and settings."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from farspan.errors import ConfigError
from farspan.nn.experts import retrieval
from farspan.nn.experts.balance import balance_record, load_balance
from farspan.nn.experts.cdmoe import CDMoE, CDMoEOptions
from farspan.nn.experts.peer import PEER, PEEROptions
from farspan.nn.experts.routers import QueryKeyRouter
from farspan.nn.experts.seimoe import SEIMoE, SEIMoEOptions
from farspan.nn.feed_forward import FEED_FORWARDS, FeedForward
from farspan.ops.experts.reference import retrieved_experts_reference
from farspan.training.optimizer import decay_groups

WIDTH = 12
SHAPE = SimpleNamespace(
    hidden_size=WIDTH, intermediate_size=10, hidden_act="silu", initializer_range=0.4, norm_eps=1e-6
)
QUERY_KEY = {"router": "query_key", "num_expert_heads": 2, "retrieval_size": 6}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cdmoe gate": ("cdmoe", {"num_experts": 16, "num_experts_per_tok": 3}),
    "cdmoe query_key": ("cdmoe", {"num_experts": 16, "num_experts_per_tok": 3, "bias": True, **QUERY_KEY}),
    "peer gate": ("peer", {"num_experts": 9, "num_experts_per_tok": 4, "router": "gate", "num_expert_heads": 1}),
    "peer query_key": ("peer", {"num_experts": 9, "num_experts_per_tok": 4, "num_expert_heads": 2, "pre_norm": True}),
    "peer tables": ("peer", {"num_experts": 9, "num_experts_per_tok": 2, **QUERY_KEY, "separate_experts": True}),
    "seimoe": ("seimoe", {"num_experts": 5, "num_experts_per_tok": 2}),
    "seimoe normalised": ("seimoe", {"num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": True}),
}


def build(name: str, options: dict[str, Any]) -> Any:
    """In float64 and evaluation mode, with every zero perturbed."""
    module = FEED_FORWARDS.get(name)[0](SHAPE, FEED_FORWARDS.build_options(name, options)).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_()
    return module


@pytest.fixture(params=sorted(VARIANTS))
def module(request: pytest.FixtureRequest) -> Any:
    return build(*VARIANTS[request.param])


def tokens(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 7)), WIDTH, dtype=torch.float64)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-9)


def all_scores(router: Any, x: Tensor) -> Tensor:
    """Scores of one token over all experts, `[H, P²]`, straight from the parameters."""
    if isinstance(router, QueryKeyRouter):
        heads, keys, _, channels = router.keys.shape
        q = (router.queries.weight @ x).view(2, heads, channels)
        axes = [[[q[a, h] @ router.keys[h, p, a] for p in range(keys)] for h in range(heads)] for a in (0, 1)]
    else:
        logits = router.gate.weight @ x
        keys = len(logits) // 2
        axes = [[list(logits[:keys])], [list(logits[keys:])]]
    return torch.stack(
        [torch.stack([sx + sy for sx in x_axis for sy in y_axis]) for x_axis, y_axis in zip(*axes, strict=True)]
    )


def routed(experts: Any, x: Tensor) -> Tensor:
    """The routed part of one token: all P² sums, the best k of each head, one neuron after the other."""
    y, options = torch.zeros(WIDTH, dtype=torch.float64), experts.options
    for head, scores in enumerate(all_scores(experts.router, x)):
        best, ids = scores.topk(options.num_experts_per_tok)
        for weight, expert in zip(best.softmax(0), ids, strict=True):
            row = expert + (head * options.num_experts if experts.sets > 1 else 0)
            act = F.gelu if experts.activation == "gelu" else F.silu
            y = y + weight * act(experts.down[row] @ x) * experts.up[row]
    return y


@pytest.mark.parametrize("name", [name for name in VARIANTS if "seimoe" not in name])
def test_retrieval_is_the_formula(name: str) -> None:
    module, x = build(*VARIANTS[name]), tokens(2, 3)
    y, record = module(x)
    assert record is None
    for row in range(2):
        for t in range(3):
            token = x[row, t]
            if isinstance(module, CDMoE):
                s = module.shared
                inner = F.silu(F.linear(token, s.gate_proj.weight, s.gate_proj.bias))
                inner = inner * F.linear(token, s.up_proj.weight, s.up_proj.bias)
                want = F.linear(inner, s.down_proj.weight, s.down_proj.bias) + routed(module.experts, token)
            else:
                if module.norm is not None:
                    token = token / (token.square().mean() + 1e-6).sqrt() * module.norm.weight
                want = routed(module.experts, token)
            close(y[row, t], want)


@pytest.mark.parametrize("normalise", [False, True])
def test_seimoe_is_the_formula(normalise: bool) -> None:
    module, x = build("seimoe", {"num_experts": 5, "num_experts_per_tok": 3, "norm_topk_prob": normalise}), tokens(6)
    y, _ = module(x)
    for got, token in zip(y, x, strict=True):
        best, ids = (module.router.weight @ token).softmax(0).topk(3)
        best = best / best.sum() if normalise else best
        want = torch.sigmoid(module.shared_expert_gate.weight @ token) * module.shared_expert(token)[0]
        want = want + sum(p * module.experts[int(e)](token)[0] for p, e in zip(best, ids, strict=True))
        close(got, want)


def test_all_experts_are_a_softmax_over_all() -> None:
    for router in ({"router": "gate"}, QUERY_KEY):
        module = build("cdmoe", {"num_experts": 9, "num_experts_per_tok": 9, **router})
        x = tokens(4)
        for got, token in zip(module.experts(x)[0], x, strict=True):
            weights = all_scores(module.experts.router, token).softmax(-1).sum(0)
            close(got, (weights * F.silu(module.experts.down @ token)) @ module.experts.up)


def test_experts_of_zero_leave_the_dense_model_unchanged() -> None:
    module, x = build(*VARIANTS["cdmoe query_key"]), tokens()
    torch.nn.init.zeros_(module.experts.up)
    assert torch.equal(module(x)[0], module.shared(x)[0])


@pytest.mark.parametrize("name", ["cdmoe gate", "cdmoe query_key", "peer query_key"])
def test_order_of_experts_has_no_effect(name: str) -> None:
    module, x = build(*VARIANTS[name]), tokens()
    want, experts = module(x)[0], module.experts
    keys = math.isqrt(experts.options.num_experts)
    order = [torch.randperm(keys), torch.randperm(keys)]
    with torch.no_grad():
        if isinstance(experts.router, QueryKeyRouter):
            for axis in (0, 1):
                experts.router.keys[:, :, axis] = experts.router.keys[:, order[axis], axis].clone()
        else:
            rows = torch.cat((order[0], keys + order[1]))
            experts.router.gate.weight.copy_(experts.router.gate.weight[rows])
        for table in (experts.down, experts.up):
            grid = table.unflatten(0, (keys, keys))[order[0]][:, order[1]].flatten(0, 1)
            table.copy_(grid.clone())
    close(module(x)[0], want)


def test_heads_are_added() -> None:
    two, x = build("peer", {"num_experts": 9, "num_experts_per_tok": 2, **QUERY_KEY}), tokens()
    total = torch.zeros_like(x)
    for head in (0, 1):
        one = build("peer", {"num_experts": 9, "num_experts_per_tok": 2, **QUERY_KEY, "num_expert_heads": 1})
        queries = two.experts.router.queries.weight.unflatten(0, (2, 2, 3))[:, head].flatten(0, 1)
        state = two.state_dict() | {
            "experts.router.queries.weight": queries,
            "experts.router.keys": two.experts.router.keys[head : head + 1],
        }
        one.load_state_dict(state)
        total = total + one(x)[0]
    close(two(x)[0], total)


def test_each_token_is_routed_by_itself(module: FeedForward) -> None:
    x = tokens(3, 5)
    y, _ = module(x)
    close(module(x.flip(0))[0], y.flip(0))
    close(module(x.flip(1))[0], y.flip(1))
    changed = x.clone()
    changed[:, -1] += 1
    close(module(changed)[0][:, :-1], y[:, :-1])
    close(torch.stack([module(row)[0] for row in x]), y)


def test_token_mixing_reads_other_tokens_as_released() -> None:
    options = {"num_experts": 16, "num_experts_per_tok": 3}
    split, mixed = build("cdmoe", options), build("cdmoe", {**options, "token_mixing": True})
    mixed.load_state_dict(split.state_dict())
    x = tokens(2, 3)
    one = x[:1, :1]
    close(mixed(one)[0], split(one)[0])  # a single token is split as intended
    assert not torch.allclose(mixed(x)[0], split(x)[0])
    changed = x.clone()
    changed[-1, -1] += 1
    assert not torch.allclose(mixed(changed)[0][1, 1], mixed(x)[0][1, 1])  # token 4 reads token 5
    halves = split.experts.router.gate(x.flatten(0, 1)).view(12, 4)
    routing = mixed.experts.route(x.flatten(0, 1))
    for t in range(6):
        close(routing.scores_x[t, 0], halves[t])  # half t mod 2 of token t // 2
        close(routing.scores_y[t, 0], halves[6 + t])


def test_gradients_equal_finite_differences(module: FeedForward) -> None:
    parameters = dict(module.named_parameters())

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))[0]

    leaves = [tokens(2).requires_grad_(), *parameters.values()]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


def test_every_parameter_has_a_gradient(module: FeedForward) -> None:
    module.train()(tokens(40))[0].square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_record_in_training_alone(module: FeedForward) -> None:
    x = tokens()
    y, record = module(x)
    assert record is None
    again, record = module.train()(x)
    assert torch.equal(again, y)
    close(record.load.sum(), torch.ones((), dtype=torch.float64))
    close(record.probability.sum(), torch.ones((), dtype=torch.float64))
    assert set(record.statistics) == {"experts_used", "busiest_expert", "load_entropy", "router_entropy"}
    assert not any(value.requires_grad for value in record.statistics.values())
    assert (record.loss is not None) == isinstance(module, CDMoE)  # the others have no loss by default


@pytest.mark.parametrize("name", ["cdmoe gate", "cdmoe query_key", "peer tables", "seimoe"])
@pytest.mark.parametrize("padded", [False, True])
def test_balance_is_counted_over_real_tokens(name: str, padded: bool) -> None:
    kind, options = VARIANTS[name]
    module, x = build(kind, {**options, "router_aux_loss_coef": 0.25}).train(), tokens()
    keep = torch.rand(2, 7) < 0.6 if padded else None
    _, record = module(x, padding_mask=keep)
    real = x[keep] if padded else x.flatten(0, 1)
    load, probability, entropy = 0, 0, 0
    for token in real:
        if isinstance(module, SEIMoE):
            scores = (module.router.weight @ token).unsqueeze(0)
        else:
            scores = all_scores(module.experts.router, token)
        p, k = scores.softmax(-1), options["num_experts_per_tok"]
        chosen = F.one_hot(p.topk(k).indices, p.shape[-1]).sum((0, 1)).double() / (k * len(p))
        load, probability = load + chosen / len(real), probability + p.mean(0) / len(real)
        entropy = entropy - (p * p.log()).sum(-1).mean() / len(real)
    experts = len(load)
    torch.testing.assert_close(record.load, load, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(record.probability, probability, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(record.loss, 0.25 * experts * (load * probability).sum(), atol=1e-6, rtol=1e-6)
    statistics = {
        "experts_used": (load > 0).double().mean(),
        "busiest_expert": experts * load.max(),
        "load_entropy": torch.special.entr(load).sum() / math.log(experts),
        "router_entropy": entropy / math.log(experts),
    }
    for key, want in statistics.items():
        torch.testing.assert_close(record.statistics[key], want, atol=1e-6, rtol=1e-6, msg=key)


@given(experts=st.integers(2, 20), seed=st.integers(0, 100))
def test_loss_is_one_for_even_probabilities_whatever_the_load(experts: int, seed: int) -> None:
    load = torch.rand(experts, generator=torch.Generator().manual_seed(seed))
    loss = load_balance(load / load.sum(), torch.full((experts,), 1 / experts))
    torch.testing.assert_close(loss, torch.ones(()))


def test_loss_and_statistics_at_both_ends() -> None:
    one = balance_record(torch.zeros(8, 1, dtype=torch.long), None, torch.eye(4)[0], torch.zeros(()), 1.0)
    assert one.loss == 4
    assert {name: float(x) for name, x in one.statistics.items()} == {
        "experts_used": 0.25,
        "busiest_expert": 4.0,
        "load_entropy": 0.0,
        "router_entropy": 0.0,
    }
    even = balance_record(torch.arange(8).view(8, 1) % 4, None, torch.full((4,), 0.25), torch.tensor(math.log(4)), 1.0)
    assert {name: float(x) for name, x in even.statistics.items()} == {
        "experts_used": 1.0,
        "busiest_expert": 1.0,
        "load_entropy": 1.0,
        "router_entropy": 1.0,
    }
    assert even.loss == 1
    nothing = balance_record(
        torch.zeros(8, 1, dtype=torch.long),
        torch.zeros(8, dtype=torch.bool),
        torch.zeros(4),
        torch.zeros(()),
        1.0,
    )
    assert nothing.loss == 0


def test_following_the_loss_evens_the_load() -> None:
    module = build("cdmoe", {"num_experts": 16, "num_experts_per_tok": 2, "router_aux_loss_coef": 1.0}).train()
    with torch.no_grad():
        module.experts.router.gate.weight[0] += 1.0  # one key is preferred by tokens of positive sum
    x = tokens(256) + 0.5
    optimizer = torch.optim.Adam(module.experts.router.parameters(), lr=0.03)
    first = module(x)[1].statistics
    for _ in range(60):
        optimizer.zero_grad()
        module(x)[1].loss.backward()
        optimizer.step()
    last = module(x)[1].statistics
    assert last["busiest_expert"] < 0.7 * first["busiest_expert"]
    assert last["load_entropy"] > first["load_entropy"]


def test_pooled_layers_equal_the_published_loss() -> None:
    doge = pytest.importorskip("transformers.models.doge.modeling_doge")
    layers = [build("cdmoe", VARIANTS["cdmoe gate"][1]).train() for _ in range(2)]
    x, keep = tokens(), torch.rand(2, 7) < 0.7
    records = [layer(x, padding_mask=keep)[1] for layer in layers]
    logits = []
    for layer in layers:
        routing = layer.experts.route(x.flatten(0, 1))
        logits.append(torch.stack((routing.scores_x[:, 0], routing.scores_y[:, 0])).float())
    want = doge.load_balancing_loss_func(tuple(logits), 16, 4, 3, keep.long())
    load, probability = (torch.stack([getattr(r, name) for r in records]).mean(0) for name in ("load", "probability"))
    torch.testing.assert_close(load_balance(load, probability).float(), want, atol=1e-5, rtol=1e-5)


def test_dropout_leaves_experts_out_in_training_alone() -> None:
    options = {**VARIANTS["peer gate"][1]}
    module, x = build("peer", {**options, "expert_dropout": 0.5}), tokens(400)
    y, _ = module(x)
    dropped = torch.stack([module.train()(x)[0] for _ in range(200)])
    assert not torch.equal(dropped[0], y)
    assert (dropped.mean(0) - y).square().mean() < 0.02 * dropped.var(0).mean()


def test_operations_are_counted(module: FeedForward, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        retrieval,
        "retrieved_experts",
        lambda *args, activation: retrieved_experts_reference(*args, activation=activation),
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(tokens(10))
    assert counter.get_total_flops() == 10 * module.flops_per_token()


def test_what_is_not_shrunk(module: FeedForward) -> None:
    spared = {id(p) for p in decay_groups(module, 0.1)[1]["params"]}
    want = {"down", "up", "keys", "bias"} | {"norm.weight"}
    names = {name for name, p in module.named_parameters() if id(p) in spared}
    assert names == {
        name for name, _ in module.named_parameters() if name.split(".")[-1] in want or name.endswith("norm.weight")
    }


def test_initialisation() -> None:
    shape = SimpleNamespace(**{**vars(SHAPE), "hidden_size": 64, "initializer_range": 0.02})
    cdmoe = CDMoE(shape, CDMoEOptions(num_experts=1024, **QUERY_KEY))
    for parameter in (cdmoe.experts.down, cdmoe.experts.up, cdmoe.experts.router.keys):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.2)
    assert PEER(shape, PEEROptions(num_experts=1024)).experts.router.keys.std().item() == pytest.approx(1, rel=0.1)
    released = CDMoE(shape, CDMoEOptions(num_experts=1024, key_init_std=0.0, **QUERY_KEY))
    assert not released.experts.router.keys.any()
    ids = released.experts.route(torch.randn(5, 64)).expert_ids
    assert (ids == ids[0, 0]).all()  # with the released zeros every token retrieves the same experts


def test_published_parameter_counts() -> None:
    shape = SimpleNamespace(**{**vars(SHAPE), "hidden_size": 32, "intermediate_size": 64})
    with torch.device("meta"):
        gate = CDMoE(shape, CDMoEOptions(num_experts=1024, num_experts_per_tok=8))
        keys = CDMoE(shape, CDMoEOptions(num_experts=1024, router="query_key", num_expert_heads=4, retrieval_size=16))
        seimoe = SEIMoE(shape, SEIMoEOptions(num_experts=6))
    dense, routed = 3 * 32 * 64, 2 * 1024 * 32
    assert sum(p.numel() for p in gate.parameters()) == dense + routed + 2 * 32 * 32
    assert sum(p.numel() for p in keys.parameters()) == dense + routed + 16 * 4 * 32 + 4 * 32 * 16
    assert sum(p.numel() for p in seimoe.parameters()) == 7 * (2 * 32 * 64 + 64 + 32) + 6 * 32 + 32


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("cdmoe", {"num_experts": 16348}, "num_experts=16348 must be a square.*choose 16129 or 16384"),
        ("cdmoe", {"num_experts": 0}, "num_experts=0 must be a square"),
        ("cdmoe", {"num_experts": 16, "num_experts_per_tok": 17}, "num_experts_per_tok=17 must lie between 1 and"),
        ("cdmoe", {"num_experts_per_tok": 0}, "num_experts_per_tok=0 must lie"),
        ("cdmoe", {"router": "query"}, "Unknown router 'query': did you mean 'query_key'"),
        ("cdmoe", {"num_expert_heads": 2}, "the gate router has one head; take router='query_key'"),
        ("cdmoe", {"num_expert_heads": 0}, "num_expert_heads=0 must be at least 1"),
        ("cdmoe", {"router": "query_key", "token_mixing": True}, "token_mixing=true .* needs router='gate'"),
        ("cdmoe", {"retrieval_size": 7}, "retrieval_size=7 must be even"),
        ("cdmoe", {"hidden_act": "swish"}, "Unknown hidden_act 'swish'"),
        ("cdmoe", {"router_aux_loss_coef": -1.0}, "router_aux_loss_coef=-1.0 must not be negative"),
        ("cdmoe", {"key_init_std": -1.0}, "key_init_std=-1.0 must not be negative"),
        ("cdmoe", {"intermediate_size": 0}, "intermediate_size=0 must be at least 1"),
        ("cdmoe", {"num_expert": 4}, "Unknown option 'num_expert' of feed-forward 'cdmoe': did you mean 'num_expert"),
        ("peer", {"expert_dropout": 1.0}, r"expert_dropout=1.0 must lie in \[0, 1\)"),
        ("peer", {"num_experts": 10}, "choose 9 or 16"),
        ("seimoe", {"num_experts_per_tok": 9}, "num_experts_per_tok=9 must lie between 1 and num_experts=8"),
        ("seimoe", {"router_aux_loss_coef": -0.1}, "router_aux_loss_coef=-0.1"),
    ],
)
def test_mistakes_have_one_clear_message(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FEED_FORWARDS.build_options(name, options)
    odd = SimpleNamespace(**{**vars(SHAPE), "hidden_size": 7})
    with pytest.raises(ConfigError, match="takes hidden_size=7, which must be even"):
        PEER(odd, PEEROptions(num_experts=4, num_experts_per_tok=1))
