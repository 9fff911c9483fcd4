"""Recipes: everything that defines a training run, as typed dataclasses read from YAML and from the command line.

A YAML file gives the defaults and the command line overrides them, so one file describes a family of runs:

    farspan train recipes/demo.yaml --train.max-steps 500

The docstring under each field is its help text (`farspan train --help`). Names are those of Hugging Face's
`TrainingArguments` and model configurations wherever the meaning is the same. The length of a run is a number of steps
or of tokens, never a time: the same recipe is the same run on every machine.
"""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from tyro.constructors import PrimitiveConstructorSpec

from farspan.errors import ConfigError
from farspan.training.schema import build, read_yaml

T = TypeVar("T")

# A dictionary of options is one JSON text on the command line: its keys belong to the mechanism, not to the recipe.
JsonOptions = Annotated[
    dict[str, Any],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda words: _parse_json(words[0]),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    ),
]


def _parse_json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError('expected a JSON object such as {"metala": {"key_dim": 32}}')
    return value


@dataclass(kw_only=True)
class ModelRecipe:
    """The model: a preset, an existing model directory, or fields of `FarspanConfig` (unset ones keep its defaults)."""

    preset: str | None = None
    """Name of a published or small size from farspan.presets; the fields below then override it."""
    from_pretrained: str | None = None
    """An existing model directory to continue from. Its configuration and its tokenizer are used as they are."""
    hidden_size: int | None = None
    """Width of the model."""
    intermediate_size: int | None = None
    """Width inside the feed-forward layers."""
    num_hidden_layers: int | None = None
    """Number of blocks."""
    num_attention_heads: int | None = None
    """Query heads per block."""
    num_key_value_heads: int | None = None
    """Key and value heads per block (grouped-query attention); must divide num_attention_heads."""
    head_dim: int | None = None
    """Width of one head."""
    mixers: list[str] | None = None
    """What mixes the tokens: one name per block, or a pattern that is repeated, such as metala metala softmax."""
    feed_forwards: list[str] | None = None
    """The feed-forward layers, named the same way."""
    mixer_options: JsonOptions = field(default_factory=dict)
    """Options of each mixer by its name, such as {"softmax": {"sliding_window": 256}}."""
    feed_forward_options: JsonOptions = field(default_factory=dict)
    """Options of each feed-forward by its name."""
    max_position_embeddings: int | None = None
    """Longest context the model is made for; unset, the trained sequence length."""
    rope_parameters: JsonOptions = field(default_factory=dict)
    """Rotary positions, as in Hugging Face configurations: rope_type, rope_theta, factor and so on."""
    tie_word_embeddings: bool | None = None
    """Whether the output layer shares the weights of the embedding."""
    norm_type: str | None = None
    """Kind of the normalisation layers."""
    norm_eps: float | None = None
    """Added to the variance inside the normalisation layers."""
    hidden_act: str | None = None
    """Activation of the feed-forward layers."""
    hidden_dropout: float | None = None
    """Dropout on each branch before it joins the residual stream."""
    initializer_range: float | None = None
    """Standard deviation of the initial weights."""

    def config_values(self) -> dict[str, Any]:
        """The fields of `FarspanConfig` that this recipe sets."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("preset", "from_pretrained")}
        return {name: value for name, value in values.items() if value is not None and value != {}}


@dataclass(kw_only=True)
class DataRecipe:
    """What to read, and how it is cut into sequences. The corpus is tokenised once and memory-mapped from then on."""

    corpus: str | None = "python-stdlib"
    """A corpus by name, or the path of a folder, a glob, a text file or a .jsonl file.
    None (null in YAML): train on what `farspan data prepare` left in data.directory."""
    tokenizer: str | None = None
    """"byte", "bpe:4096" (trained on the corpus; any size), or a directory with a Hugging Face tokenizer.
    Unset: the tokenizer of model.from_pretrained if that is given, otherwise "byte"."""
    directory: str | None = None
    """Where the tokenised corpus is kept; share it between runs that compare. Unset: data/ in the run directory."""
    text_field: str | None = None
    """Field of a .jsonl line that holds the text. Unset: "text", or else "content"."""
    valid_fraction: float = 0.05
    """Share of the documents that training never sees and evaluation reads."""
    test_fraction: float = 0.05
    """Share of the documents that neither of them touches."""
    sequence_length: int = 512
    """Tokens per sequence. Documents are packed into it back to back."""
    separate_documents: bool = True
    """Whether every document starts from a clean memory and position 0; otherwise sequences run across documents."""


@dataclass(kw_only=True)
class TrainRecipe:
    """How the weights move."""

    max_steps: int | None = None
    """Length of the run in optimiser steps. Give this or max_tokens."""
    max_tokens: int | None = None
    """Length of the run in tokens (rounded up to whole steps). Give this or max_steps."""
    per_device_train_batch_size: int = 8
    """Sequences in one forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimiser step. The result equals one pass over all of them, with less memory."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    lr_scheduler_type: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape of the learning rate after warm-up; wsd holds the peak and falls (1 - sqrt) over the last decay_steps."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from zero."""
    decay_steps: int | None = None
    """Only for wsd: steps of the final decay. Unset: a fifth of the run."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a fraction of the peak (cosine, linear, wsd)."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices. Biases, norms, gates and the like never decay."""
    adam_beta1: float = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: float = 0.95
    """Decay of AdamW's second moment."""
    adam_epsilon: float = 1e-8
    """AdamW's guard against division by zero."""
    row_sparse: Literal["none", "experts", "all"] = "none"
    """Tables of which AdamW leaves rows without a gradient alone, moments included.
    experts: those of cdmoe and peer; all: those and embeddings. Faster where a step touches few of many rows."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are shortened to it; 0 turns clipping off."""
    seed: int = 0
    """Seed of the weights, of the order of the data and of dropout."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 computes in bfloat16 and keeps float32 weights; auto takes it where the processor has it in hardware."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a third more work, far less memory."""
    torch_compile: bool = False
    """Compile the model's blocks with torch.compile: the first step takes seconds, the others less on a GPU."""


@dataclass(kw_only=True)
class EvaluationRecipe:
    """Bits per byte on the valid split while training."""

    eval_steps: int = 200
    """Evaluate every this many steps; 0 evaluates only at the end."""
    max_windows: int | None = 64
    """Windows per evaluation while training. The one at the end always reads the whole split."""
    batch_tokens: int = 8192
    """Tokens in one forward pass."""


@dataclass(kw_only=True)
class CheckpointRecipe:
    """Training state on disk, from which a run continues exactly, even after it was killed."""

    save_steps: int = 200
    """Save every this many steps, in the background; 0 saves only at the end or on Ctrl-C."""
    save_total_limit: int = 2
    """How many checkpoints are kept; older ones are deleted once a newer one is complete."""


@dataclass(kw_only=True)
class LoggingRecipe:
    """What a run writes and shows. metrics.jsonl gets every step in any case."""

    logging_steps: int = 10
    """Steps between lines on a console without a live display, and between TensorBoard points."""
    tensorboard: bool = True
    """Write TensorBoard events to tensorboard/ in the run directory."""
    progress: Literal["auto", "live", "plain", "none"] = "auto"
    """Live bar, plain lines or nothing; auto shows the bar on a terminal."""


@dataclass(kw_only=True)
class Recipe:
    """Train a language model from a recipe."""

    name: str = "run"
    """Name of the run, used in the report."""
    output_dir: str | None = None
    """The run directory; it ends as a model directory. Unset: runs/NAME."""
    imports: list[str] = field(default_factory=list)
    """Python modules to import first, such as one that registers a mixer.
    They are imported again wherever the run is read (eval, generate, info): have them installed or in PYTHONPATH."""
    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    logging: LoggingRecipe = field(default_factory=LoggingRecipe)

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return Path(self.output_dir or f"runs/{self.name}")

    def validate(self) -> "Recipe":
        """Returns the recipe itself if its values fit together.

        Raises:
            ConfigError: naming the field, its value and what is accepted.
        """
        train, data = self.train, self.data
        if (train.max_steps is None) == (train.max_tokens is None):
            raise ConfigError(
                f"train.max_steps={train.max_steps} and train.max_tokens={train.max_tokens}: "
                "give exactly one of them (the other is None); it is the length of the run."
            )
        at_least = {
            "train.max_steps": (train.max_steps, 1),
            "train.max_tokens": (train.max_tokens, 1),
            "train.per_device_train_batch_size": (train.per_device_train_batch_size, 1),
            "train.gradient_accumulation_steps": (train.gradient_accumulation_steps, 1),
            "train.warmup_steps": (train.warmup_steps, 0),
            "train.decay_steps": (train.decay_steps, 1),
            "train.weight_decay": (train.weight_decay, 0),
            "train.max_grad_norm": (train.max_grad_norm, 0),
            "train.seed": (train.seed, 0),
            "data.sequence_length": (data.sequence_length, 2),
            "evaluation.eval_steps": (self.evaluation.eval_steps, 0),
            "evaluation.max_windows": (self.evaluation.max_windows, 1),
            "evaluation.batch_tokens": (self.evaluation.batch_tokens, 1),
            "checkpoint.save_steps": (self.checkpoint.save_steps, 0),
            "checkpoint.save_total_limit": (self.checkpoint.save_total_limit, 1),
            "logging.logging_steps": (self.logging.logging_steps, 1),
        }
        for name, (value, least) in at_least.items():
            if value is not None and not value >= least:
                raise ConfigError(f"{name}={value}: accepted are numbers from {least} upwards.")
        if train.seed >= 2**63:
            raise ConfigError(f"train.seed={train.seed}: accepted are numbers below 2^63.")
        if not 0 < train.learning_rate < float("inf"):
            raise ConfigError(f"train.learning_rate={train.learning_rate}: accepted are finite numbers above 0.")
        if not 0 < train.adam_epsilon < 1:
            raise ConfigError(f"train.adam_epsilon={train.adam_epsilon}: accepted are numbers between 0 and 1.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(train, name) < 1:
                raise ConfigError(f"train.{name}={getattr(train, name)}: accepted are numbers in [0, 1).")
        if not 0 <= train.min_lr_ratio <= 1:
            raise ConfigError(f"train.min_lr_ratio={train.min_lr_ratio}: accepted are numbers in [0, 1].")
        if train.decay_steps is not None and train.lr_scheduler_type != "wsd":
            raise ConfigError(
                f"train.decay_steps={train.decay_steps} has no meaning for lr_scheduler_type="
                f"{train.lr_scheduler_type!r}; it belongs to 'wsd'."
            )
        if data.corpus is None and data.directory is None:
            raise ConfigError("data.corpus=None: name a corpus, or the prepared dataset in data.directory.")
        if self.model.preset and self.model.from_pretrained:
            raise ConfigError(
                f"model.preset={self.model.preset!r} and model.from_pretrained={self.model.from_pretrained!r}: "
                "give one of them."
            )
        if not self.name.strip() or "/" in self.name or self.name.startswith("."):
            raise ConfigError(f"name={self.name!r}: accepted is any text without '/' that does not begin with '.'.")
        if self.output_dir is not None and not self.output_dir.strip():
            raise ConfigError(f"output_dir={self.output_dir!r}: name a directory, or leave it unset for runs/NAME.")
        return self

    def total_steps(self, world_size: int = 1) -> int:
        """Length of the run in optimiser steps.

        Args:
            world_size: Number of processes that read at the same time.

        Raises:
            ConfigError: The run is too short for its learning-rate schedule.
        """
        train = self.train
        total = train.max_steps or math.ceil((train.max_tokens or 0) / self.tokens_per_step(world_size))
        if train.warmup_steps >= total:
            raise ConfigError(
                f"train.warmup_steps={train.warmup_steps}: the run has {total} steps, so the learning rate would never "
                "reach its peak; give fewer steps of warm-up or a longer run."
            )
        if train.warmup_steps + (train.decay_steps or 0) > total:
            raise ConfigError(
                f"train.decay_steps={train.decay_steps}: the run has {total} steps, {train.warmup_steps} of them "
                "warm-up; give fewer steps of decay or a longer run."
            )
        return total

    def tokens_per_step(self, world_size: int = 1) -> int:
        """Tokens that all processes together read in one optimiser step."""
        train = self.train
        micro_batch = train.per_device_train_batch_size * self.data.sequence_length
        return micro_batch * train.gradient_accumulation_steps * world_size

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dictionaries, every field included."""
        return asdict(self)

    def to_yaml(self) -> str:
        """The recipe as a YAML text that `load_recipe` reads back to an equal recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)


def load_recipe(path: str | Path) -> Recipe:
    """Reads a recipe from a YAML file; fields that the file leaves out keep their defaults.

    Args:
        path: The YAML file.

    Returns:
        The recipe, not yet validated as a whole (the command line may still complete it).

    Raises:
        ConfigError: The file is missing or is not YAML, names an unknown field (with the nearest name) or gives a
            value of another type.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"recipe {str(path)!r} does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {str(path)!r} cannot be read: {error}") from None
    try:
        values = read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {str(path)!r} is not valid YAML: {error}") from None
    try:
        return build(Recipe, values)
    except ConfigError as error:
        raise ConfigError(f"recipe {str(path)!r}: {error}") from None
