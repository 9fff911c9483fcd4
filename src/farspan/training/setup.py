"""Data, model and precision from a recipe."""

import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from farspan.data.dataset import PreparedDataset, open_dataset
from farspan.data.prepare import prepare
from farspan.data.tokenizers import SMALLEST_VOCABULARY, load_tokenizer, tokenizer_hash
from farspan.errors import CheckpointError, ConfigError
from farspan.evaluation.environment import processor
from farspan.evaluation.loading import check_model_directory, load_model
from farspan.training.recipe import ModelRecipe, Recipe
from farspan.training.run import Run


def seed_everything(seed: int) -> None:
    """Seeds the global generators of Python, numpy and torch (CPU and GPU)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def choose_precision(name: Literal["auto", "bf16", "fp32"], device: torch.device) -> torch.dtype:
    """The dtype of matrix products: what was named, or for "auto" bfloat16 where the hardware multiplies it natively.

    Raises:
        ConfigError: "bf16" on a GPU that does not have it.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = bool(processor()["bfloat16"])
    if name == "bf16" and device.type == "cuda" and not native:
        raise ConfigError(f"train.precision='bf16': {torch.cuda.get_device_name(device)} has no bfloat16; use fp32.")
    return torch.bfloat16 if name == "bf16" or (name == "auto" and native) else torch.float32


def data_directory(recipe: Recipe) -> Path:
    """Where the tokenised corpus of a recipe is kept."""
    return Path(recipe.data.directory) if recipe.data.directory else recipe.run_dir / "data"


def open_data(recipe: Recipe, run: Run, fingerprint: str | None) -> PreparedDataset:
    """The tokenised corpus of a recipe; prepared first if it is not there yet.

    A run that resumes opens what it was trained on and does not look at the corpus again.

    Args:
        recipe: A validated recipe.
        run: The opened run.
        fingerprint: Fingerprint of the corpus that this run began with, if it resumes.

    Raises:
        DataError: The corpus or the dataset is missing, damaged, or without text to train or to evaluate on.
        ConfigError: The tokenizer of the dataset is not that of `model.from_pretrained`.
        CheckpointError: The directory now holds another corpus than the run began with.
    """
    data, directory, pretrained = recipe.data, data_directory(recipe), recipe.model.from_pretrained
    if run.checkpoint or data.corpus is None:
        dataset = open_dataset(directory)
    else:
        dataset = prepare(
            data.corpus,
            data.tokenizer or pretrained or "byte",
            directory,
            valid=data.valid_fraction,
            test=data.test_fraction,
            text_field=data.text_field,
        )
    if pretrained and tokenizer_hash(load_tokenizer(pretrained)) != dataset.metadata.tokenizer_hash:
        raise ConfigError(
            f"{str(dataset.directory)!r} was tokenised by another tokenizer ({dataset.metadata.tokenizer!r}) than the "
            f"one in model.from_pretrained={pretrained!r}; leave data.tokenizer unset and give another data.directory."
        )
    if run.checkpoint and fingerprint and fingerprint != dataset.metadata.fingerprint:
        raise CheckpointError(
            f"{str(directory)!r} holds another corpus (fingerprint {dataset.metadata.fingerprint[:12]}) than this run "
            f"began with ({fingerprint[:12]}); bring the old one back or start a new run with another output_dir."
        )
    dataset.split("valid")  # raises if it is empty: better now than at the first evaluation
    return dataset


def check_model(recipe: Recipe) -> None:
    """Refuses a model that cannot be built, before any time goes into the data.

    Raises:
        ConfigError: A value the configuration does not accept.
        CheckpointError: `from_pretrained` is not a model directory.
    """
    if recipe.model.from_pretrained:
        check_model_directory(recipe.model.from_pretrained)
    else:
        _configure(recipe, vocab_size=SMALLEST_VOCABULARY)


def build_model(recipe: Recipe, tokenizer: Any) -> Any:
    """The model of a recipe, in float32, on the CPU.

    Args:
        recipe: What to build.
        tokenizer: Gives the vocabulary size and the special tokens of a new model.

    Returns:
        A `FarspanForCausalLM` in training mode.

    Raises:
        ConfigError: A value the configuration does not accept, or one that contradicts the model to continue from.
        CheckpointError: `from_pretrained` holds no readable model.
    """
    from farspan.models import FarspanForCausalLM

    if recipe.model.from_pretrained:
        return _load_model(recipe.model.from_pretrained, recipe.model, tokenizer)
    config = _configure(
        recipe,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return FarspanForCausalLM(config).train()


def _configure(recipe: Recipe, **tokenizer_values: Any) -> Any:
    """The configuration of a new model: the preset's values, over them the recipe's, over them the tokenizer's."""
    from farspan.models import FarspanConfig, presets

    try:
        values = presets.get(recipe.model.preset).to_dict() if recipe.model.preset else {}
        values |= {"max_position_embeddings": recipe.data.sequence_length}  # whatever length a preset is published for
        return FarspanConfig(**{**values, **recipe.model.config_values(), **tokenizer_values})
    except ConfigError as error:
        raise ConfigError(f"model: {error}") from error


def _load_model(directory: str, recipe: ModelRecipe, tokenizer: Any) -> Any:
    """An existing model, whose own configuration wins; fields of the recipe may only repeat it."""
    from farspan.models import FarspanConfig

    model = load_model(directory)
    found = model.config.to_dict()
    wanted = FarspanConfig(**{**found, **recipe.config_values()}).to_dict()
    differing = [f"{name} ({wanted[name]!r}, there {found[name]!r})" for name in found if wanted[name] != found[name]]
    if differing:
        raise ConfigError(
            f"model.from_pretrained={directory!r} is another model than the recipe describes: {', '.join(differing)}. "
            "Leave these fields of model unset; the model's own configuration is used."
        )
    if len(tokenizer) > model.config.vocab_size:
        raise ConfigError(
            f"model.from_pretrained={directory!r}: its tokenizer has {len(tokenizer)} tokens, "
            f"its model only {model.config.vocab_size}."
        )
    return model.train()


def recompute_activations(model: Any) -> None:
    """Turns activation checkpointing on, block by block."""
    # transformers renamed the method between the oldest and the newest release we support
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def compile_model(model: Any, backend: str = "inductor") -> None:
    """Compiles a model in place: each block by itself, for which one graph serves all that are alike.

    The first step then takes as long for many layers as for one. Models without our blocks are compiled as a whole.

    Args:
        model: the model; with activation checkpointing, each block is recomputed by its compiled form.
        backend: as for `torch.compile`.
    """
    from farspan.models.blocks import FarspanBlock

    blocks = [module for module in model.modules() if isinstance(module, FarspanBlock)]
    # Each kind of block, shape and mode is one more graph of the same function; beyond the limit PyTorch compiles none.
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 8 * len(blocks))
    for part in blocks or [model]:
        part.compile(backend=backend)
