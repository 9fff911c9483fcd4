"""What one step computes, and what a run leaves behind."""

import json
import math
import random
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.cli.main import main
from farspan.data.dataset import open_dataset
from farspan.data.loader import make_loader
from farspan.errors import CheckpointError, ConfigError, DataError
from farspan.nn.feed_forward import AuxiliaryRecord, FeedForward, register_feed_forward
from farspan.training.guard import NonFiniteError
from farspan.training.logs import read_metrics
from farspan.training.loop import optimizer_step, train
from farspan.training.optimizer import build_optimizer
from farspan.training.parallel import Parallel
from farspan.training.recipe import Recipe, TrainRecipe
from farspan.training.setup import choose_precision, recompute_activations

Tiny = Callable[..., Recipe]
ALONE = Parallel(rank=0, world_size=1, device=torch.device("cpu"))
# Sums of the same numbers in another order, in float32 and over a few hundred terms.
REORDERED = {"atol": 1e-6, "rtol": 1e-5}


def tiny_model(**values: Any) -> Any:
    from farspan.models import FarspanConfig, FarspanForCausalLM

    torch.manual_seed(0)
    config = {"vocab_size": 258, "hidden_size": 16, "num_attention_heads": 2, "mixers": ["metala", "softmax"]}
    return FarspanForCausalLM(FarspanConfig(**{**config, **values})).train()


def batches(directory: Path, count: int, batch_size: int) -> list[dict[str, Tensor]]:
    loader = iter(make_loader(open_dataset(directory), sequence_length=16, batch_size=batch_size))
    return [next(loader) for _ in range(count)]


def step(model: Any, micro_batches: list[dict[str, Tensor]], **values: Any) -> tuple[float, float]:
    precision = values.pop("precision", torch.float32)
    settings = TrainRecipe(max_steps=1, learning_rate=0.1, **values)
    optimizer = build_optimizer(model, settings)
    return optimizer_step(model, optimizer, micro_batches, settings, precision, ALONE, step=1)[:2]


def test_accumulation_equals_one_large_batch(dataset_directory: Path) -> None:
    (large,) = batches(dataset_directory, 1, batch_size=4)
    small = batches(dataset_directory, 4, batch_size=1)
    for batch in (small[0], large):  # micro-batches with unequal numbers of labels must not count equally
        batch["labels"] = batch["labels"].clone()  # (the loader's tensors may share memory)
        batch["labels"][:, :9] = -100
    models = tiny_model(), tiny_model()
    results = step(models[0], [large]), step(models[1], small)
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    # AdamW divides a gradient by its size, so compare gradients, not weights.
    gradients = []
    for model, micro_batches in zip(models, ([large], small), strict=True):
        model.load_state_dict(tiny_model().state_dict())
        count = sum(int((batch["labels"] != -100).sum()) for batch in micro_batches)
        for batch in micro_batches:
            labels = batch["labels"]
            rest = {name: value for name, value in batch.items() if name != "labels"}
            model(**rest, shift_labels=labels, num_items_in_batch=count, output_logits=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, **REORDERED)


@dataclass
class SquaredOptions:
    pass


class Squared(FeedForward):
    """A feed-forward with an auxiliary loss."""

    def __init__(self, config: Any, options: SquaredOptions) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> tuple[Tensor, AuxiliaryRecord]:
        y = self.proj(x)
        return y, AuxiliaryRecord(loss=10 * y.square().mean())

    def flops_per_token(self) -> float:
        return 2.0 * self.proj.weight.numel()


register_feed_forward("training_test_squared", Squared, SquaredOptions)


def test_an_auxiliary_loss_does_not_grow_with_accumulation(dataset_directory: Path) -> None:
    (large,) = batches(dataset_directory, 1, batch_size=4)
    small = batches(dataset_directory, 4, batch_size=1)
    results = [step(tiny_model(feed_forwards=["training_test_squared"]), given) for given in ([large], small)]
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_the_step_is_clipped_adamw_on_the_mean_loss(dataset_directory: Path) -> None:
    (batch,) = batches(dataset_directory, 1, batch_size=2)
    model, expected = tiny_model(), tiny_model()
    loss, norm = step(model, [batch], max_grad_norm=0.5, weight_decay=0.0)

    logits = expected(batch["input_ids"], position_ids=batch["position_ids"], cu_seqlens=batch["cu_seqlens"]).logits
    reference = torch.nn.functional.cross_entropy(logits[0], batch["labels"][0], ignore_index=-100)
    reference.backward()
    optimizer = torch.optim.AdamW(expected.parameters(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.5)), rel=1e-4)
    assert loss == pytest.approx(reference.item(), rel=1e-5)
    optimizer.step()
    moved = torch.cat([p.detach().flatten() for p in model.parameters()])
    wanted = torch.cat([p.detach().flatten() for p in expected.parameters()])
    # The first AdamW step is lr·sign(g) but where |g| comes near epsilon: rounding shows there, and only there.
    assert ((moved - wanted).abs() > 1e-3).float().mean() < 0.01


def test_gradients_within_the_norm_are_left_alone(dataset_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (batch,) = batches(dataset_directory, 1, batch_size=2)
    clipped: list[float] = []
    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", lambda _, most, norm: clipped.append(float(norm)))
    norms = [step(tiny_model(), [batch], max_grad_norm=most)[1] for most in (0.0, 1e6, 1e-3)]
    assert clipped == norms[2:]


def test_recomputed_activations_change_nothing(dataset_directory: Path) -> None:
    (batch,) = batches(dataset_directory, 1, batch_size=2)
    plain, recomputing = tiny_model(), tiny_model()
    recompute_activations(recomputing)
    assert step(plain, [batch]) == pytest.approx(step(recomputing, [batch]), rel=1e-6)


def test_bf16_keeps_float32_weights_and_stays_near_float32(dataset_directory: Path) -> None:
    (batch,) = batches(dataset_directory, 1, batch_size=2)
    full, half = tiny_model(), tiny_model()
    exact = step(full, [batch])
    rounded = step(half, [batch], precision=torch.bfloat16)
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.02)  # 8 bits of mantissa
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}


def test_precision_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for native in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: {"avx512_bf16": native})
        assert choose_precision("auto", ALONE.device) == (torch.bfloat16 if native else torch.float32)
        assert choose_precision("bf16", ALONE.device) == torch.bfloat16
        assert choose_precision("fp32", ALONE.device) == torch.float32


def test_a_broken_gradient_stops_the_step_before_the_weights(dataset_directory: Path) -> None:
    (batch,) = batches(dataset_directory, 1, batch_size=2)
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.model.layers[1].mixer.o_proj.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(NonFiniteError, match=r"step 1.*'model.layers.1.mixer.o_proj.weight' \(16, 16\)"):
        step(model, [batch])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_run_that_diverges_names_the_step_and_keeps_its_checkpoint(tiny: Tiny, monkeypatch: Any) -> None:
    from farspan.training import loop

    def diverging(*args: Any, **kwargs: Any) -> Any:
        if kwargs["step"] == 5:
            with torch.no_grad():
                args[0].model.embed_tokens.weight[:] = math.inf
        return optimizer_step(*args, **kwargs)

    monkeypatch.setattr(loop, "optimizer_step", diverging)
    recipe = tiny()
    with pytest.raises(NonFiniteError, match=r"step 5: the loss is nan.*'model.embed_tokens.weight'.*resume never"):
        train(recipe)
    assert [path.name for path in (recipe.run_dir / "checkpoints").iterdir()] == ["step_00000003"]
    assert not (recipe.run_dir / "config.json").exists()  # broken weights are no model


@pytest.mark.parametrize("way", ["--model.from-pretrained", "--resume"])
def test_the_advice_after_a_divergence_can_be_followed(
    way: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(tiny("my run", train={"learning_rate": 0.5}).to_yaml())
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "get_total_norm", lambda gradients: torch.tensor(math.inf))
        assert main(["train", str(recipe)]) == 2
    message = capsys.readouterr().err
    advice = re.search(rf"({way} .*?)(, or |\.$)", message.strip())
    assert advice and "a lower --train.learning-rate" in message
    words = [word.replace("ANOTHER", str(tmp_path / "another")) for word in shlex.split(advice[1])]
    assert main(["train", str(recipe), "--train.learning-rate", "1e-3", *words]) == 0


def test_a_run_directory_ends_as_a_model_directory(tiny: Tiny) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = tiny(logging={"tensorboard": True, "logging_steps": 4})
    assert train(recipe) == recipe.run_dir
    names = {path.name for path in recipe.run_dir.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "report.html"}
    assert not [name for name in names if "partial" in name]
    model = AutoModelForCausalLM.from_pretrained(recipe.run_dir)
    tokenizer = AutoTokenizer.from_pretrained(recipe.run_dir)
    assert tokenizer.decode(tokenizer("12\n13").input_ids) == "12\n13"
    assert len(model.generate(torch.tensor([[49, 50]]), max_new_tokens=3, do_sample=False)[0]) <= 5
    assert model.config.max_position_embeddings == 16 and model.config.eos_token_id == tokenizer.eos_token_id

    about = json.loads((recipe.run_dir / "run.json").read_text())
    assert about["finished"] and about["step"] == 12 and about["tokens"] == 12 * 2 * 16
    assert about["sequence_length"] == 16 and len(about["corpus"]["fingerprint"]) == 64
    assert {"farspan", "torch", "transformers", "python"} <= about["versions"].keys()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(recipe.run_dir / "tensorboard"))
    events.Reload()
    rows = [row for row in read_metrics(recipe.run_dir / "metrics.jsonl") if row["kind"] == "train"]
    logged = {event.step: event.value for event in events.Scalars("train/loss")}
    assert logged == {row["step"]: pytest.approx(row["loss"]) for row in rows if row["step"] % 4 == 0}


def test_the_data_is_prepared_in_the_run_directory(tiny: Tiny) -> None:
    recipe = tiny(data={"directory": None})
    train(recipe)
    assert json.loads((recipe.run_dir / "run.json").read_text())["dataset"] == "data"
    assert (recipe.run_dir / "data/dataset.json").is_file()


def test_a_prepared_dataset_needs_no_corpus(tiny: Tiny) -> None:
    train(tiny(data={"corpus": None}))


def test_tokens_are_rounded_up_to_whole_steps(tiny: Tiny) -> None:
    recipe = tiny(train={"max_steps": None, "max_tokens": 65})
    train(recipe)
    assert json.loads((recipe.run_dir / "run.json").read_text())["tokens"] == 96


def test_plain_lines_tell_of_progress(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny(logging={"progress": "auto", "logging_steps": 6}))
    text = capsys.readouterr().out
    assert [line.split()[1] for line in text.splitlines() if "loss" in line] == ["1/12", "6/12", "12/12"]
    assert "FLOP/s" in text and "valid" in text and "report.html" in text


def test_training_goes_on_from_a_model_directory(tiny: Tiny) -> None:
    first = tiny("first")
    train(first)
    weights = {"preset": None, "mixers": None, "hidden_dropout": None, "from_pretrained": str(first.run_dir)}
    second = tiny("second", model=weights)
    train(second)
    start, end = (read_metrics(recipe.run_dir / "metrics.jsonl") for recipe in (first, second))
    assert end[0]["loss"] < start[0]["loss"] - 0.01

    other = tiny("third", model={**weights, "hidden_size": 32})
    with pytest.raises(ConfigError, match=r"another model than the recipe describes: hidden_size \(32, there 16\)"):
        train(other)
    missing = tiny("fourth", model={**weights, "from_pretrained": "nowhere"})
    with pytest.raises(CheckpointError, match="model directory nowhere does not exist"):
        train(missing)


def test_a_tokenizer_other_than_the_models_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    first = tiny("first")
    train(first)
    weights = {"mixers": None, "hidden_dropout": None, "from_pretrained": str(first.run_dir)}
    second = tiny("second", model=weights, data={"tokenizer": "bpe:300", "directory": str(tmp_path / "other")})
    with pytest.raises(ConfigError, match=r"tokenised by another tokenizer \('bpe:300'\)"):
        train(second)


def test_another_corpus_in_the_same_place_is_refused(tiny: Tiny) -> None:
    recipe = tiny(checkpoint={"save_steps": 3})
    train(recipe)
    about = json.loads((recipe.run_dir / "run.json").read_text())
    about |= {"finished": False, "corpus": {**about["corpus"], "fingerprint": "0" * 64}}
    (recipe.run_dir / "run.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=r"holds another corpus .* than this run began with \(000000000000\)"):
        train(recipe)


def test_a_model_that_cannot_be_built_is_refused_before_the_data_is_prepared(tiny: Tiny) -> None:
    recipe = tiny(model={"num_attention_heads": 3}, data={"directory": None})
    with pytest.raises(ConfigError, match=r"model: .*num_attention_heads"):
        train(recipe)
    assert not (recipe.run_dir / "data").exists()


def test_a_corpus_without_a_valid_split_is_refused_before_training(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("0123456789" * 100)
    recipe = tiny(data={"corpus": str(tmp_path / "one.txt"), "directory": None, "valid_fraction": 0.0})
    with pytest.raises(DataError, match=r"valid split .* is empty"):
        train(recipe)
    assert not (recipe.run_dir / "metrics.jsonl").exists()


def test_recomputed_activations_are_work_but_not_utilisation(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from farspan.training import loop

    monkeypatch.setattr(loop, "peak_flops", lambda device, precision: 1e12)
    for recomputing, share in ((False, 1.0), (True, 0.75)):
        recipe = tiny(f"run{recomputing}", train={"max_steps": 3, "gradient_checkpointing": recomputing})
        train(recipe)
        row = read_metrics(recipe.run_dir / "metrics.jsonl")[0]
        assert row["mfu"] * 1e12 == pytest.approx(share * row["flops_per_second"], rel=1e-4)


def test_a_schedule_that_does_not_fit_the_run_is_refused_before_the_data(tiny: Tiny) -> None:
    for values, message in (
        ({"warmup_steps": 12}, r"train\.warmup_steps=12: the run has 12 steps"),
        ({"max_steps": None, "max_tokens": 65, "warmup_steps": 3}, r"train\.warmup_steps=3: the run has 3 steps"),
        ({"lr_scheduler_type": "wsd", "decay_steps": 13}, r"train\.decay_steps=13: the run has 12 steps"),
        ({"lr_scheduler_type": "wsd", "decay_steps": 11}, r"train\.decay_steps=11: the run has 12 steps, 2 of them"),
    ):
        recipe = tiny(train=values, data={"directory": None})
        with pytest.raises(ConfigError, match=message):
            train(recipe)
        assert not (recipe.run_dir / "data").exists()


def test_modules_of_the_recipe_are_imported_with_the_run(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from farspan.mixers.base import MIXERS

    recipe = tiny(model={"mixers": ["from_a_module"]}, train={"max_steps": 3})
    recipe.imports = ["farspan_test_mixers"]
    with pytest.raises(ConfigError, match=r"imports: 'farspan_test_mixers' cannot be imported \(No module named"):
        train(recipe)
    assert not recipe.run_dir.exists()

    (tmp_path / "farspan_test_mixers.py").write_text(
        "from farspan.mixers.base import register_mixer\n"
        "from farspan.mixers.softmax import SoftmaxMixer, SoftmaxOptions\n"
        "class Mixer(SoftmaxMixer): pass\n"
        "register_mixer('from_a_module', Mixer, SoftmaxOptions)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    train(recipe)
    run = str(recipe.run_dir)
    generate = ["generate", run, "12", "--max-new-tokens", "2"]
    evaluate = ["eval", run, "--protocols", "sliding", "--no-baselines"]
    for command in (["info", run], generate, evaluate):  # each as in a new process
        monkeypatch.delitem(sys.modules, "farspan_test_mixers")
        monkeypatch.delitem(MIXERS._entries, "from_a_module")
        assert main(command) == 0, capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "farspan_test_mixers")
    monkeypatch.delitem(MIXERS._entries, "from_a_module")


def test_resuming_on_another_machine_is_noted(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny(logging={"progress": "plain"})
    train(recipe)
    about = json.loads((recipe.run_dir / "run.json").read_text())
    (recipe.run_dir / "run.json").write_text(json.dumps({**about, "finished": False, "threads": 64}))
    train(recipe)
    assert "note: other threads than before; digits may differ" in capsys.readouterr().out


def test_several_processes_are_refused_until_they_work(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE=2"):
        train(tiny())


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK"])
def test_a_launcher_that_gives_no_numbers_is_named(name: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "x")
    with pytest.raises(ConfigError, match=f"{name}='x' in the environment is not a number"):
        train(tiny())


@pytest.mark.parametrize("mixer", ["metala", "softmax"])
def test_fifty_steps_learn_to_recall(mixer: str, tiny: Tiny, tmp_path: Path) -> None:
    """Each text repeats two letters of eight: only memory tells the next one. Guessing costs ln 8 = 2.08 nats."""
    draw, folder = random.Random(0), tmp_path / "recall"
    folder.mkdir()
    for number in range(600):
        (folder / f"{number}.txt").write_text("".join(draw.choices("abcdefgh", k=2)) * 16)
    recipe = tiny(
        model={
            "mixers": [mixer] * 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "hidden_dropout": 0.0,
            "tie_word_embeddings": False,
        },
        data={"corpus": str(folder), "directory": None, "sequence_length": 64},
        train={"max_steps": 50, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "warmup_steps": 5},
        evaluation={"eval_steps": 0},
        checkpoint={"save_steps": 0},
    )
    train(recipe)
    losses = [row["loss"] for row in read_metrics(recipe.run_dir / "metrics.jsonl") if row["kind"] == "train"]
    assert sum(losses[-5:]) / 5 < 0.5  # two letters in thirty-two have to be guessed


def test_the_log_holds_what_routers_report(tiny: Tiny) -> None:
    options = {"cdmoe": {"num_experts": 16, "num_experts_per_tok": 4}}
    model = {"feed_forwards": ["gated_mlp", "cdmoe"], "feed_forward_options": options}
    recipe = tiny(model=model, train={"max_steps": 3, "gradient_accumulation_steps": 2})
    train(recipe)
    rows = [row for row in read_metrics(recipe.run_dir / "metrics.jsonl") if row["kind"] == "train"]
    assert len(rows) == 3
    for row in rows:
        assert 0.25 <= row["experts_used"] <= 1 <= row["busiest_expert"] <= 4
        assert 0 < row["load_entropy"] < 1.001 and 0 < row["router_entropy"] < 1.001
