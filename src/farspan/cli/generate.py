"""`farspan generate`: continues a prompt and shows the text as it comes."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from farspan.cli import _output
from farspan.errors import ConfigError, DataError

if TYPE_CHECKING:
    from farspan.evaluation.generation import Sample, Sampling

_DESCRIPTION = """Continue a prompt with a trained model. The text goes to stdout, everything else to stderr.

    farspan generate runs/demo 'def fibonacci(n):'
    farspan generate runs/demo --num-samples 5 --seed 1 --json runs/demo/samples.json --check-python
    git diff | farspan generate runs/demo - --stop '\\n\\n' --max-new-tokens 100"""


@dataclass(kw_only=True)
class _Command:
    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """A model directory, such as a run of farspan train."""
    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[PROMPT]")] = ""
    """The text to continue; - reads it from stdin. Without one a new document is started."""
    prompt_file: str | None = None
    """A UTF-8 file with the prompt; - is stdin."""
    max_new_tokens: int = 256
    """Tokens to generate at most."""
    temperature: float = 0.8
    """Higher is more varied; 0 takes the likeliest token each time."""
    top_p: float = 0.95
    """Sample from the likeliest tokens that together have this probability; 1 takes all."""
    top_k: int = 0
    """Sample from so many of the likeliest tokens; 0 does not limit them."""
    seed: int = 0
    """Seed of the first sample; each further one adds 1."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A text at which to stop, not printed; may be given several times. \\n and \\t are understood."""
    num_samples: int = 1
    """How many texts to generate."""
    stream: bool = True
    """Show the text as it comes, not only at the end."""
    cache: bool = True
    """Decode with the model's memory; without it every token reads the whole text again."""
    max_prompt_tokens: int | None = None
    """Refuse prompts of more tokens."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; auto is float32 on the CPU and bfloat16 on a GPU."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: Path | None = None
    """Save the samples with their seeds and options to this file; samples.json in a run enters its report.
    Earlier samples there are replaced, any other file is left alone."""
    check_python: bool = False
    """Print the share of complete lines that read as Python (the rule is in farspan.evaluation.samples)."""


def run(argv: list[str]) -> int:
    """Runs `farspan generate`.

    Args:
        argv: The arguments after `generate`.

    Returns:
        0 when all samples were generated.

    Raises:
        FarspanError: What the user can mend.
        SystemExit: From the argument parser, after it has printed help (0) or a message (2).
    """
    options = tyro.cli(_Command, args=argv, prog="farspan generate", description=_DESCRIPTION)
    if options.num_samples < 1:
        raise ConfigError(f"num_samples={options.num_samples} is not accepted; it has to be at least 1.")
    if not 0 <= options.seed < 2**63:
        raise ConfigError(f"seed={options.seed} is not accepted; it has to be at least 0 and below 2^63.")

    from farspan.evaluation.loading import check_model_directory, choose_device, load_model, load_tokenizer

    check_model_directory(options.directory)  # a mistake in the directory is said at once
    if options.json is not None:
        check_samples(options.json)
    prompt = read_prompt(options.prompt, options.prompt_file)

    import torch

    from farspan.evaluation.generation import Sampling, sample_text

    sampling = Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        stop=tuple(_unescaped(stop) for stop in options.stop),
        cache=options.cache,
    )
    device = choose_device(options.device)
    dtype = {"auto": "bfloat16" if device.type == "cuda" else "float32"}.get(options.dtype, options.dtype)
    tokenizer = load_tokenizer(options.directory)
    model = load_model(options.directory, device=device, dtype=getattr(torch, dtype))
    samples = []
    for number in range(options.num_samples):
        if options.num_samples > 1:
            title = f"sample {number + 1} of {options.num_samples}, seed {options.seed + number}"
            _output.message(title)
        sample = sample_text(
            model,
            tokenizer,
            prompt,
            seed=options.seed + number,
            sampling=sampling,
            max_prompt_tokens=options.max_prompt_tokens,
            write=_writer() if options.stream else None,
        )
        if not options.stream:
            _writer()(sample.text)
        sys.stdout.write("\n")
        sys.stdout.flush()
        samples.append(sample)
    _report(samples, options.check_python)
    if options.json is not None:
        save_samples(options.json, samples, sampling)
        if options.json.resolve().parent == options.directory.resolve():
            _output.refresh_report(options.directory)
    return 0


def read_prompt(prompt: str, file: str | None) -> str:
    """The prompt from the argument, a file, or stdin (`-` for either); "" when neither is given.

    Raises:
        ConfigError: when both are given.
        DataError: when the file does not exist or the prompt is not UTF-8 text.
    """
    if prompt and file is not None:
        raise ConfigError("a prompt and --prompt-file were given; give one of them.")
    if "-" in (prompt, file):
        name, read = "stdin", sys.stdin.buffer.read
    elif file is not None:
        name, read = file, Path(file).read_bytes
    else:
        name, read = "the argument", lambda: prompt.encode("utf-8", "surrogateescape")
    try:
        return read().decode("utf-8")
    except FileNotFoundError:
        raise DataError(f"prompt file {name} does not exist.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"the prompt from {name} is not UTF-8 text ({error.reason} at byte {error.start}).") from None


def check_samples(path: Path) -> None:
    """Refuses to replace a file that holds anything but samples.

    Raises:
        ConfigError: there is such a file, or a directory.
    """
    if not path.exists():
        return
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        content = None
    ours = isinstance(content, list) and all(
        isinstance(item, dict) and {"prompt", "text"} <= set(item) for item in content
    )
    if not ours:
        raise ConfigError(f"--json {path} holds something other than samples and is not replaced; name another file.")


def save_samples(path: Path, samples: "list[Sample]", sampling: "Sampling") -> None:
    """Writes samples as a JSON list: prompt, seed, text, complete, tokens, seconds and options of each."""
    from farspan.data import _files

    content: list[dict[str, Any]] = [{**asdict(sample), "options": asdict(sampling)} for sample in samples]
    with _files.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    _files.write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _report(samples: "list[Sample]", check_python: bool) -> None:
    tokens, seconds = sum(sample.tokens for sample in samples), sum(sample.seconds for sample in samples)
    _output.message(f"{tokens} tokens in {seconds:.1f} s, {tokens / max(seconds, 1e-9):.1f} tokens/s", style="dim")
    if check_python:
        from farspan.evaluation.samples import python_share

        count = python_share((sample.prompt, sample.text) for sample in samples)
        _output.message(f"{count.share:.1%} of {count.lines} complete lines read as Python", style="dim")


def _writer() -> Callable[[str], None]:
    """Writes text to stdout at once; on a terminal, control characters of the model's are shown as U+FFFD."""
    visible = sys.stdout.isatty()

    def write(text: str) -> None:
        if visible:
            text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
        sys.stdout.write(text)
        sys.stdout.flush()

    return write


def _unescaped(text: str) -> str:
    return text.replace("\\n", "\n").replace("\\t", "\t")
