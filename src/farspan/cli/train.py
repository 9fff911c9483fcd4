"""`farspan train`: a recipe, by path or by name, with fields overridden on the command line."""

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import tyro

import farspan
from farspan.errors import ConfigError, nearest
from farspan.training.recipe import Recipe, load_recipe

_DESCRIPTION = """Train a language model from a recipe: `farspan train RECIPE [--section.field VALUE ...]`.

RECIPE is a YAML file or the name of one in recipes/; its values are the defaults below, and options override them.
The same command resumes a run that was stopped or killed, from its newest complete checkpoint. Ctrl-C finishes the
step, saves and leaves; pressed twice it leaves at once.

    farspan train demo
    farspan train recipes/demo.yaml --train.max-steps 500 --output-dir runs/short
    farspan train demo --model.mixers metala metala softmax --output-dir runs/hybrid"""


@dataclass(kw_only=True)
class _Command(Recipe):
    """A recipe and what to do with an earlier run; the fields of the recipe come from the YAML file."""

    resume: Literal["auto", "must", "never"] = "auto"
    """auto starts or resumes; must refuses to start; never moves an earlier run aside and starts."""


def run(argv: list[str]) -> int:
    """Runs `farspan train`.

    Args:
        argv: The arguments after `train`.

    Returns:
        0: the run is finished, was finished already, or was stopped by Ctrl-C and saved.

    Raises:
        FarspanError: What the user can mend.
        SystemExit: From the argument parser, after it has printed help (0) or a message (2).
    """
    words = list(argv)
    named = bool(words) and not words[0].startswith("-")
    recipe = load_recipe(find_recipe(words.pop(0))) if named else Recipe()
    default = _Command(**{field.name: getattr(recipe, field.name) for field in fields(recipe)})
    command = tyro.cli(_Command, args=words, default=default, prog="farspan train RECIPE", description=_DESCRIPTION)
    if not named:
        raise ConfigError(f"farspan train needs a recipe: a YAML file, or one of: {', '.join(shipped_recipes())}.")
    recipe = Recipe(**{field.name: getattr(command, field.name) for field in fields(Recipe)}).validate()

    from farspan.training.loop import train  # torch and transformers, not needed for --help and mistakes

    train(recipe, resume=command.resume, command=shlex.join(["farspan", "train", *argv]))
    return 0


def find_recipe(name: str) -> Path:
    """The file that a recipe argument means: a path, or the name of a shipped recipe.

    Raises:
        ConfigError: There is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    if path.is_dir():
        raise ConfigError(f"recipe {name!r} is a directory; give a YAML file or one of: {', '.join(shipped)}.")
    raise ConfigError(f"recipe {name!r} is neither a file nor a shipped recipe; {nearest(name, shipped)}")


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with Farspan, by name, and over them those in recipes/ of the current directory."""
    folders = [Path(farspan.__file__).parent / "recipes", Path("recipes")]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}
