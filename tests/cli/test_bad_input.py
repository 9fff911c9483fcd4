"""Mistakes that a user makes: each gives one clear message and exit code 2, no traceback, and loses nothing.

`CASES` is the table. Every case starts from a finished tiny run (`run/`, with its dataset in `run/data`), its corpus
and its recipe, makes the mistake, and runs one command. `WORK` in an argument is the folder of all that.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from farspan.cli.main import main
from tests.cli.mistakes import (
    Mistake,
    both,
    cut,
    edit,
    fill,
    fill_the_checkpoints,
    fill_the_disk,
    folder,
    poke,
    remove,
    write,
)


@dataclass(frozen=True)
class Case:
    """One mistake: the command line, what the message must say, and what is broken before."""

    command: str
    message: str
    mistake: Mistake = lambda work: None
    full_disk: Callable[[pytest.MonkeyPatch], None] = lambda monkeypatch: None
    parser: bool = False  # said by the argument parser, in its own form


RUN = "WORK/run"
NO_BASELINES = "--no-baselines --protocols sliding"
CASES = {
    # the program
    "unknown command": Case("evaluate", "unknown command 'evaluate': did you mean 'eval'"),
    "unknown data command": Case("data prepar", "did you mean 'prepare'"),
    "unknown option": Case(f"generate {RUN} --temprature 1", "Unrecognized options.*temprature", parser=True),
    "option of the wrong type": Case(f"generate {RUN} --seed many", "--seed: invalid literal", parser=True),
    "missing argument": Case("eval", "Missing from farspan eval: DIR", parser=True),
    # model directories
    "generate from nothing": Case("generate WORK/none", "directory .*none does not exist"),
    "generate from an empty directory": Case("generate WORK/new", "no config.json", folder("new")),
    "generate from a file": Case("generate WORK/recipe.yaml", "is a file; give the directory"),
    "eval of nothing": Case("eval WORK/none", "directory .*none does not exist"),
    "eval of an empty directory": Case("eval WORK/new", "no config.json", folder("new")),
    "info of an empty directory": Case("info WORK/new", "no config.json", folder("new")),
    "a run that is still training": Case(f"eval {RUN}", "training in it has not stopped", remove("run/config.json")),
    "missing weights": Case(f"generate {RUN}", "no model.safetensors", remove("run/model.safetensors")),
    "truncated weights": Case(f"generate {RUN}", "weights .* cannot be read", cut("run/model.safetensors", 900)),
    "empty weights": Case(f"eval {RUN}", "weights .* cannot be read", write("run/model.safetensors", "")),
    "missing tokenizer": Case(
        f"generate {RUN}",
        "no tokenizer",
        both(remove("run/tokenizer.json"), remove("run/tokenizer_config.json")),
    ),
    "damaged tokenizer": Case(f"generate {RUN}", "no tokenizer that", write("run/tokenizer.json", "{")),
    "config that is not JSON": Case(f"info {RUN}", "config.json is damaged", write("run/config.json", "{'a'")),
    "config of another family": Case(
        f"info {RUN}", "of type 'gpt2'", edit("run/config.json", '"model_type": "farspan"', '"model_type": "gpt2"')
    ),
    "config with an unknown key": Case(
        f"info {RUN}",
        "hiden_size.*did you mean 'hidden_size'",
        edit("run/config.json", '"hidden_size"', '"hiden_size"'),
    ),
    "config with a wrong value": Case(
        f"info {RUN}",
        "num_attention_heads=3",
        edit("run/config.json", '"num_attention_heads": 2', '"num_attention_heads": 3'),
    ),
    "config of an unknown dtype": Case(
        f"info {RUN}", "config.json is damaged", edit("run/config.json", '"dtype": "float32"', '"dtype": "float33"')
    ),
    "record of the run that is not UTF-8": Case(f"info {RUN}", "run.json is damaged", write("run/run.json", b"\xff")),
    "record of the run that is no object": Case(f"generate {RUN}", "run.json is damaged", write("run/run.json", "[]")),
    "record of the run with a wrong value": Case(
        f"eval {RUN}",
        "run.json is damaged: sequence_length is 'many', not int",
        edit("run/run.json", '"sequence_length": 32', '"sequence_length": "many"'),
    ),
    "record of the run with half a corpus": Case(
        f"info {RUN}", "run.json is damaged: fingerprint is None", edit("run/run.json", '"fingerprint"', '"finger"')
    ),
    "a module that the run needs": Case(
        f"generate {RUN}",
        "'no_such_module' cannot be imported",
        edit("run/run.json", '"imports": []', '"imports": ["no_such_module"]'),
    ),
    "weights of another config": Case(
        f"generate {RUN}",
        "are not those of its config.json",
        edit("run/config.json", '"intermediate_size": 32', '"intermediate_size": 48'),
    ),
    "weights of a deeper model": Case(
        f"eval {RUN}",
        "are not those of its config.json",
        lambda work: (work / "run/config.json").write_text(
            json.dumps(
                json.loads((work / "run/config.json").read_text())
                | {"num_hidden_layers": 2, "mixers": ["metala"] * 2, "feed_forwards": ["gated_mlp"] * 2}
            )
        ),
    ),
    # generate
    "prompt longer than allowed": Case(
        f"generate {RUN} 123456 --max-prompt-tokens 5", "prompt has 6 tokens, longer than the 5 allowed"
    ),
    "two prompts": Case(f"generate {RUN} x --prompt-file WORK/recipe.yaml", "give one of them"),
    "missing prompt file": Case(f"generate {RUN} --prompt-file WORK/none", "none does not exist"),
    "prompt that is not UTF-8": Case(
        f"generate {RUN} --prompt-file WORK/prompt", "not UTF-8 text", write("prompt", b"a\xff")
    ),
    "argument that is not UTF-8": Case(f"generate {RUN} a\udcff", "from the argument is not UTF-8 text"),
    "negative temperature": Case(f"generate {RUN} --temperature -1", "temperature=-1"),
    "top-p out of range": Case(f"generate {RUN} --top-p 1.5", "top_p=1.5"),
    "no samples": Case(f"generate {RUN} --num-samples 0", "num_samples=0"),
    "unknown device": Case(f"generate {RUN} --device gpu", "device 'gpu' cannot be used"),
    "absent device": Case(f"eval {RUN} --device cuda:99", "device 'cuda:99' cannot be used"),
    "device without numbers": Case(f"generate {RUN} --device meta", "device 'meta' cannot be used"),
    "samples over the model": Case(
        f"generate {RUN} --json {RUN}/config.json", "other than samples and is not replaced"
    ),
    "samples over a list": Case(
        f"generate {RUN} --json WORK/list.json", "other than samples and is not replaced", write("list.json", "[1]")
    ),
    "samples over a folder": Case(f"generate {RUN} --json {RUN}/data", "other than samples and is not replaced"),
    "disk full while saving samples": Case(
        f"generate {RUN} x --max-new-tokens 2 --json WORK/run/samples.json",
        "disk is full",
        write("run/samples.json", "[]"),
        full_disk=fill_the_disk,
    ),
    # eval
    "dataset gone": Case(f"eval {RUN}", "dataset .* is gone .* --data", remove("run/data")),
    "trained on nobody knows what": Case(f"eval {RUN}", "name the text with --data", remove("run/run.json")),
    "unknown corpus": Case(f"eval {RUN} --data python-stdlb", "did you mean 'python-stdlib'"),
    "unknown split": Case(f"eval {RUN} --split dev", "no split 'dev'"),
    "unknown protocol": Case(f"eval {RUN} --protocols slide", "invalid choice 'slide'", parser=True),
    "length beyond the data": Case(f"eval {RUN} --lengths 9999999", "9999999 is longer than the whole valid split"),
    "stride of nothing": Case(f"eval {RUN} --stride 0", "stride=0"),
    "windows of nothing": Case(f"eval {RUN} --max-windows 0", "max_windows=0"),
    "batches of nothing": Case(f"eval {RUN} --batch-tokens 0", "batch_tokens=0 is not accepted"),
    "no protocol": Case(f"eval {RUN} --protocols", "protocols: none is named"),
    "budget too small for a text": Case(f"eval {RUN} --max-tokens 5", "max_tokens=5 is not enough for one text of 16"),
    "damaged log": Case(
        f"eval {RUN} {NO_BASELINES}", "metrics.jsonl, line 1 is damaged", poke("run/metrics.jsonl", 0, b"\xff")
    ),
    "tokens outside the vocabulary": Case(
        f"eval {RUN}", "valid.bin is damaged: token 3 is 65535", poke("run/data/valid.bin", 6, b"\xff\xff")
    ),
    "dataset of another tokenizer": Case(
        f"eval {RUN}",
        "another tokenizer",
        edit("run/data/dataset.json", '"tokenizer_hash": "', '"tokenizer_hash": "0'),
    ),
    "truncated token file": Case(f"eval {RUN}", "valid.bin has .* truncated", cut("run/data/valid.bin", -4)),
    "index that lies about sizes": Case(
        f"eval {RUN}", "valid.idx is damaged", poke("run/data/valid.idx", 34, b"\xff\x01")
    ),
    "index of another format": Case(
        f"eval {RUN}", "valid.idx is not an index", poke("run/data/valid.idx", 0, b"GARBAGE")
    ),
    "missing index": Case(f"eval {RUN}", "is incomplete: valid.idx missing", remove("run/data/valid.idx")),
    "damaged dataset.json": Case(f"eval {RUN}", "dataset.json is damaged", write("run/data/dataset.json", "{}")),
    "disk full while saving results": Case(
        f"eval {RUN} {NO_BASELINES}",
        "disk is full",
        write("run/evaluation/evaluation.json", "{}"),
        full_disk=fill_the_disk,
    ),
    # data
    "prepare nothing": Case("data prepare --corpus WORK/none --out WORK/out", "neither a path"),
    "prepare an empty directory": Case("data prepare --corpus WORK/new --out WORK/out", "no files", folder("new")),
    "prepare an empty file": Case(
        "data prepare --corpus WORK/new --tokenizer byte --out WORK/out",
        "no .*text in its train split",
        write("new/a.txt", ""),
    ),
    "prepare what is not UTF-8": Case(
        "data prepare --corpus WORK/new --out WORK/out",
        "none of its 1 files is UTF-8",
        write("new/a.txt", b"\xff\xfe\x00"),
    ),
    "lines that are not JSON": Case(
        "data prepare --corpus WORK/a.jsonl --tokenizer byte --out WORK/out",
        "line 2: not valid JSON",
        write("a.jsonl", '{"text": "x"}\n{"text": \n'),
    ),
    "lines without text": Case(
        "data prepare --corpus WORK/a.jsonl --tokenizer byte --out WORK/out",
        "no field",
        write("a.jsonl", '{"body": 1}\n'),
    ),
    "fractions that leave nothing": Case(
        "data prepare --corpus WORK/corpus --out WORK/out --valid-fraction 0.7 --test-fraction 0.4", "sum below 1"
    ),
    "vocabulary too small": Case(
        "data prepare --corpus WORK/corpus --tokenizer bpe:10 --out WORK/out", "BPE of 10 tokens"
    ),
    "unknown tokenizer": Case(
        "data prepare --corpus WORK/corpus --tokenizer words --out WORK/out", "tokenizer 'words' is not known"
    ),
    "another dataset in the way": Case(
        "data prepare --corpus WORK/corpus --tokenizer byte --out WORK/run/data", "was prepared from other inputs"
    ),
    "something else in the way": Case(
        "data prepare --corpus WORK/corpus --tokenizer byte --out WORK/corpus", "is not a prepared dataset; it is left"
    ),
    "disk full while preparing": Case(
        "data prepare --corpus WORK/corpus --tokenizer byte --out WORK/out", "disk is full", full_disk=fill_the_disk
    ),
    "inspect nothing": Case("data inspect WORK/none", "neither a path that exists nor a built-in corpus"),
    "inspect an empty directory": Case("data inspect WORK/new", "no files found there", folder("new")),
    "inspect tokens outside the vocabulary": Case(
        "data inspect WORK/run/data", "test.bin is damaged: token 3 is 65535", poke("run/data/test.bin", 6, b"\xff\xff")
    ),
    "inspect a truncated index": Case(
        "data inspect WORK/run/data/valid.idx", "valid.idx is truncated", cut("run/data/valid.idx", 20)
    ),
    # train
    "train nothing": Case("train", "needs a recipe"),
    "missing recipe": Case("train WORK/none.yaml", "neither a file nor a shipped recipe"),
    "recipe that is not YAML": Case("train WORK/recipe.yaml", "not valid YAML", write("recipe.yaml", "a: [1")),
    "recipe that is not UTF-8": Case("train WORK/recipe.yaml", "cannot be read", write("recipe.yaml", b"a: \xff")),
    "recipe with an unknown key": Case(
        "train WORK/recipe.yaml --output-dir WORK/new",
        "train.max_step .*did you mean 'max_steps'",
        edit("recipe.yaml", "max_steps", "max_step"),
    ),
    "recipe with a wrong type": Case(
        "train WORK/recipe.yaml --output-dir WORK/new",
        "max_steps='two'",
        edit("recipe.yaml", "max_steps: 2", "max_steps: two"),
    ),
    "recipe without a length": Case(
        "train WORK/recipe.yaml --output-dir WORK/new --train.max-tokens 5", "exactly one of them"
    ),
    "heads that do not divide the width": Case(
        "train WORK/recipe.yaml --output-dir WORK/new --model.num-attention-heads 3", "num_attention_heads=3"
    ),
    "unknown mixer": Case("train WORK/recipe.yaml --output-dir WORK/new --model.mixers metal", "did you mean 'metala'"),
    "unknown option of a mixer": Case(
        'train WORK/recipe.yaml --output-dir WORK/new --model.mixer-options {"metala":{"colour":1}}',
        "Unknown option 'colour'",
    ),
    "train on an empty directory": Case(
        "train WORK/recipe.yaml --output-dir WORK/new --data.corpus WORK/empty", "no files", folder("empty")
    ),
    "train from an empty directory": Case(
        "train WORK/recipe.yaml --output-dir WORK/new --model.from-pretrained WORK/empty",
        "is not a model directory",
        folder("empty"),
    ),
    "output directory of another recipe": Case(
        "train WORK/recipe.yaml --output-dir WORK/run --train.seed 7", "train.seed .was 0, now 7"
    ),
    "output directory of something else": Case(
        "train WORK/recipe.yaml --output-dir WORK/other", "not a run", write("other/config.json", "{}")
    ),
    "nothing to resume": Case("train WORK/recipe.yaml --output-dir WORK/new --resume must", "nothing to resume"),
    "sequences longer than the data": Case(
        "train WORK/recipe.yaml --output-dir WORK/new --data.sequence-length 9999999", "fewer than one window"
    ),
    "disk full before training": Case(
        "train WORK/recipe.yaml --output-dir WORK/new", "the disk is full", full_disk=fill_the_disk
    ),
    "disk full while writing a checkpoint": Case(
        "train WORK/recipe.yaml --output-dir WORK/new",
        "the checkpoint of step 2 was not written: no space left on the disk",
        full_disk=fill_the_checkpoints,
    ),
    "a learning-rate schedule longer than the run": Case(
        "train WORK/recipe.yaml --output-dir WORK/new --train.warmup-steps 2", "train.warmup_steps=2: the run has 2"
    ),
    "seed beyond the generator": Case(
        f"train WORK/recipe.yaml --output-dir WORK/new --train.seed {2**70}", "accepted are numbers below 2\\^63"
    ),
    "name that is a directory": Case("train WORK/recipe.yaml --name ..", "that does not begin with '.'"),
    "recipe with a key twice": Case(
        "train WORK/recipe.yaml --output-dir WORK/new",
        "name is given twice.* line 2, column 1",
        write("recipe.yaml", "name: a\nname: b"),
    ),
    "module that is not there": Case(
        "train WORK/recipe.yaml --output-dir WORK/new --imports no_such_module",
        "imports: 'no_such_module' cannot be imported",
    ),
    "vocabulary too large": Case(
        f"train WORK/recipe.yaml --output-dir WORK/new --data.tokenizer bpe:{10**20}", "at most 2147483648"
    ),
    "training data outside the vocabulary": Case(
        "train WORK/recipe.yaml --output-dir WORK/new --data.directory WORK/run/data",
        "train.bin is damaged: token .* is 65535",
        fill("run/data/train.bin", b"\xff"),
    ),
    "a finished run, and a mistake in the one to replace it": Case(
        "train WORK/recipe.yaml --output-dir WORK/run --resume never --model.mixers metal", "did you mean 'metala'"
    ),
    "train in a run with a damaged record": Case(
        "train WORK/recipe.yaml --output-dir WORK/run", "run.json is damaged", write("run/run.json", b"\xff")
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_message_exit_code_2_and_nothing_lost(
    name: str, workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    case.mistake(workspace)
    before = contents(workspace)
    case.full_disk(monkeypatch)
    argv = [word.replace("WORK", str(workspace)) for word in case.command.split()]
    assert not re.search(case.message, " ".join(argv)), "the message has to say more than what was given"
    assert main(argv) == 2
    monkeypatch.undo()
    captured = capsys.readouterr()
    text = " ".join(captured.err.replace("│", " ").split())
    assert re.search(case.message, text), text
    assert "Traceback" not in captured.out + captured.err
    assert len(re.findall(r"^error: ", captured.err, re.MULTILINE)) == (not case.parser)
    after = contents(workspace)
    assert {path: after.get(path) for path in before} == before
    assert not [path for path in after if path not in before and path.endswith("samples.json")]


def test_the_table_covers_every_command() -> None:
    commands = {
        " ".join(case.command.split()[: 2 if case.command.startswith("data") else 1]) for case in CASES.values()
    }
    assert {"train", "eval", "generate", "info", "data prepare", "data inspect"} <= commands
    assert len(CASES) >= 25


def contents(work: Path) -> dict[str, str]:
    """Every file, by the hash of its content; logs and locks may change."""
    return {
        str(path.relative_to(work)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(work.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
