"""Recipes: what is read, what is refused and by which name, and what the command line changes."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest
import torch
import yaml

import farspan
from farspan.cli.train import find_recipe, run, shipped_recipes
from farspan.errors import ConfigError
from farspan.training.recipe import ModelRecipe, Recipe, load_recipe
from farspan.training.setup import build_model, check_model


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {learning_rat: 1}", "train.learning_rat is not a field of a recipe; did you mean 'learning_rate'?"),
        ("trane: {}", "trane is not a field of a recipe; did you mean 'train'?"),
        ("train: {learning_rate: fast}", "train.learning_rate='fast': expected a number, got str."),
        ("train: {max_steps: 1.5}", "train.max_steps=1.5: expected a whole number, got float."),
        ("train: {max_steps: true}", "train.max_steps=True: expected a whole number, got bool."),
        ("train: {torch_compile: 1}", "train.torch_compile=1: expected true or false, got int."),
        (
            "train: {lr_scheduler_type: cosin}",
            "train.lr_scheduler_type='cosin' is not accepted; did you mean 'cosine'?",
        ),
        ("train: 5", "train: expected fields and values, got 5."),
        ("model: {mixers: metala}", "model.mixers='metala': expected a list, got str."),
        ("model: {mixers: [metala, 3]}", "model.mixers[1]=3: expected a text, got int."),
        ("model: {mixer_options: [1]}", "model.mixer_options=[1]: expected a mapping, got list."),
        ("name: 7", "name=7: expected a text, got int."),
        ("- a list", "the file: expected fields and values, got ['a list']."),
        ("train: {", "is not valid YAML"),
        ("name: a\nname: b", "name is given twice; keep one of the two"),
        ("train:\n  seed: 1\n  max_steps: 2\n  seed: 3", "line 4, column 3"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_recipe(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "give exactly one of them"),
        ("train: {max_steps: 1, max_tokens: 1}", "give exactly one of them"),
        ("train: {max_steps: 0}", "train.max_steps=0: accepted are numbers from 1 upwards."),
        ("train: {max_steps: 1, learning_rate: 0}", "train.learning_rate=0.0: accepted are finite numbers above 0."),
        ("train: {max_steps: 1, weight_decay: .nan}", "train.weight_decay=nan"),
        ("train: {max_steps: 1, adam_beta2: 1}", "train.adam_beta2=1.0: accepted are numbers in [0, 1)."),
        ("train: {max_steps: 1, min_lr_ratio: 2}", "train.min_lr_ratio=2.0: accepted are numbers in [0, 1]."),
        ("train: {max_steps: 1, decay_steps: 5}", "it belongs to 'wsd'"),
        ("train: {max_steps: 1}\ndata: {sequence_length: 1}", "data.sequence_length=1"),
        ("train: {max_steps: 1}\ndata: {corpus: null}", "name a corpus, or the prepared dataset in data.directory"),
        ("train: {max_steps: 1}\nmodel: {preset: a, from_pretrained: b}", "give one of them"),
        ("train: {max_steps: 1}\nname: a/b", "name='a/b'"),
        ("train: {max_steps: 1}\nname: ..", "name='..': accepted is any text without '/' that does not begin with"),
        ("train: {max_steps: 1}\nname: .hidden", "name='.hidden'"),
        ("train: {max_steps: 1}\noutput_dir: ''", "output_dir=''"),
        (f"train: {{max_steps: 1, seed: {2**70}}}", f"train.seed={2**70}: accepted are numbers below 2^63."),
    ],
)
def test_values_that_do_not_fit_together_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_recipe(write(tmp_path, text)).validate()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml' does not exist"):
        load_recipe(tmp_path / "none.yaml")


def test_numbers_may_be_written_as_people_write_them(tmp_path: Path) -> None:
    train = load_recipe(write(tmp_path, "train: {learning_rate: 1e-3, max_tokens: 1e9, weight_decay: 0}")).train
    assert (train.learning_rate, train.max_tokens, train.weight_decay) == (1e-3, 10**9, 0.0)
    assert isinstance(train.max_tokens, int) and isinstance(train.weight_decay, float)


def test_a_written_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = Recipe(name="ä", model=ModelRecipe(mixers=["metala"], mixer_options={"metala": {"short_convolution": 4}}))
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


def test_every_field_of_the_model_is_one_of_its_configuration() -> None:
    from farspan.models import FarspanConfig

    known = set(FarspanConfig(vocab_size=8, hidden_size=8, num_attention_heads=1).to_dict())
    fields = {field.name for field in dataclasses.fields(ModelRecipe)} - {"preset", "from_pretrained"}
    assert fields <= known


def test_shipped_recipes_are_found_from_anywhere_and_are_part_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    package = Path(farspan.__file__).parent
    assert {find_recipe(name).parent for name in ("demo", "hybrid", "bytes")} == {package / "recipes"}
    project = tomllib.loads((package.parents[1] / "pyproject.toml").read_text())
    shipped = {
        path for pattern in project["tool"]["setuptools"]["package-data"]["farspan"] for path in package.glob(pattern)
    }
    assert set(shipped_recipes().values()) <= shipped


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_build_a_model(name: str) -> None:
    class Tokenizer:
        bos_token_id, eos_token_id, pad_token_id = None, 0, 1

        def __len__(self) -> int:
            return 4096

    recipe = load_recipe(find_recipe(name)).validate()
    with torch.device("meta"):
        model = build_model(recipe, Tokenizer())
    assert recipe.name == name
    assert sum(parameter.numel() for parameter in model.parameters()) < 10_000_000
    assert model.flops_per_token(recipe.data.sequence_length) > 0


def test_a_preset_is_a_start_and_the_recipe_wins() -> None:
    class Tokenizer:
        bos_token_id, eos_token_id, pad_token_id = None, 0, 1

        def __len__(self) -> int:
            return 300

    recipe = Recipe(model=ModelRecipe(preset="hybrid-3m", hidden_size=96))
    recipe.data.sequence_length = 128
    with torch.device("meta"):
        config = build_model(recipe, Tokenizer()).config
    assert config.mixers == ["metala", "metala", "softmax"] * 2
    assert (config.hidden_size, config.vocab_size, config.max_position_embeddings) == (96, 300, 128)
    recipe.model.preset = "hybrid-4m"
    with pytest.raises(ConfigError, match=r"model: Unknown preset 'hybrid-4m': did you mean 'hybrid-3m'"):
        check_model(recipe)


def test_the_command_line_overrides_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from farspan.training import loop

    seen: list[Recipe] = []
    monkeypatch.setattr(loop, "train", lambda recipe, **options: seen.append(recipe))
    path = write(tmp_path, "train: {max_steps: 5, seed: 3}\nmodel: {mixers: [softmax]}")
    words = ["--train.max-steps", "7", "--model.mixers", "metala", "softmax", "--model.num-hidden-layers", "4"]
    options = ["--model.mixer-options", '{"metala": {"expand_value": 1}}', "--resume", "never"]
    assert run([str(path), *words, *options]) == 0
    (recipe,) = seen
    assert (recipe.train.max_steps, recipe.train.seed) == (7, 3)
    assert recipe.model.mixers == ["metala", "softmax"] and recipe.model.num_hidden_layers == 4
    assert recipe.model.mixer_options == {"metala": {"expand_value": 1}}
    assert type(recipe) is Recipe and "resume" not in yaml.safe_load(recipe.to_yaml())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.max-step", "5"], "--train.max-steps"),
        (["--train.max-steps", "many"], "many"),
        (["--train.lr-scheduler-type", "cosin"], "cosine"),
        (["--model.mixer-options", "[1]"], "JSON object"),
        (["--model.mixer-options", "{"], "not valid JSON"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    path = write(tmp_path, "train: {max_steps: 5}")
    with pytest.raises(SystemExit) as leaving:
        run([str(path), *words])
    captured = capsys.readouterr()
    assert leaving.value.code == 2
    assert message in captured.err + captured.out


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        run(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())  # without the frame and its line breaks
    assert leaving.value.code == 0
    for word in ("--train.learning-rate", "Peak learning rate", "--resume", "moves an earlier run aside", "byte"):
        assert word in text


@pytest.mark.parametrize("words", [[], ["no-such-recipe"], ["."]])
def test_a_missing_recipe_names_those_that_exist(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="demo"):
        run(words)
