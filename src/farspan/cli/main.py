"""The `farspan` program: it finds the command, runs it, and turns errors into one line and an exit code.

Exit codes: 0 done; 2 a mistake that the user can mend (the message says how); 130 interrupted; 1 a fault of the program
(with its traceback).
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from rich.table import Table

import farspan
from farspan.cli import _output
from farspan.errors import FarspanError, nearest
from farspan.evaluation.memory import is_out_of_memory

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("farspan.cli.train:run", "train a model from a recipe, or go on with a run"),
    "eval": ("farspan.cli.eval:run", "measure bits per byte and perplexity by context length"),
    "generate": ("farspan.cli.generate:run", "continue a prompt with a trained model"),
    "convert": ("farspan.cli.convert:run", "convert a published checkpoint, or write one back in its published form"),
    "bench": ("farspan.cli.bench:run", "measure how fast a model trains and decodes on this machine"),
    "info": ("farspan.cli.info:run", "show versions, devices and backends, or describe a model directory"),
    "data": ("farspan.cli.main:run_data", "prepare a corpus for training, or inspect one (prepare | inspect)"),
}
"""Every command: where its `run(argv) -> exit code` lives, and one line of help. Imported only when asked for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code.

    Args:
        argv: the arguments after the program's name; None takes them from `sys.argv`.

    Returns:
        0 when done, 2 for a mistake that the user can mend, 130 when interrupted, otherwise the command's own code.
    """
    # Threads that wait for each other must sleep, not spin: with another busy process on the same cores, spinning made
    # an evaluation take ten times as long. OpenMP reads this when torch is loaded, so it has to be set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments, debug = _split_debug(list(sys.argv[1:] if argv is None else argv))
    _output.tolerate_encoding()
    try:
        return _dispatch(arguments)
    except FarspanError as error:
        return _failed(str(error), debug)
    except BrokenPipeError:
        _output.silence_broken_pipe()
        return 141
    except OSError as error:
        return _failed(_output.describe_os_error(error), debug)
    except KeyboardInterrupt:
        _output.message("interrupted")
        return 130
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _failed(f"out of memory: {error}", debug)
    except SystemExit as leaving:  # the argument parser prints its own message
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None) * 2


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _print_help()
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        _output.out.print(f"farspan {farspan.__version__}", highlight=False)
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        return _output.fail(f"unknown command {name!r}: {nearest(name, COMMANDS)}")
    module, _, function = COMMANDS[name][0].partition(":")
    run: Callable[[list[str]], int | None] = getattr(importlib.import_module(module), function)
    return run(rest) or 0


def run_data(argv: list[str]) -> int:
    """Runs `farspan data <command>`: the functions of `farspan.cli.data.COMMANDS`, one sub-command each."""
    import tyro

    from farspan.cli.data import COMMANDS as DATA_COMMANDS

    if argv and not argv[0].startswith("-") and argv[0] not in DATA_COMMANDS:
        return _output.fail(f"unknown command 'data {argv[0]}': {nearest(argv[0], DATA_COMMANDS)}")
    result = tyro.extras.subcommand_cli_from_dict(dict(DATA_COMMANDS), prog="farspan data", args=argv)
    return result if isinstance(result, int) else 0


def _split_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Takes `--debug` out of the arguments (before a `--`); the variable FARSPAN_DEBUG=1 means the same."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept = [argument for argument in arguments[:end] if argument != "--debug"] + arguments[end:]
    return kept, len(kept) < len(arguments) or os.environ.get("FARSPAN_DEBUG", "0") not in ("", "0")


def _failed(text: str, debug: bool) -> int:
    if debug:
        _output.err.print_exception()
    return _output.fail(text)


def _print_help() -> None:
    _output.out.print("usage: farspan <command> [options]\n", highlight=False, markup=False)
    table = Table.grid(padding=(0, 3, 0, 2))
    for name, (_, line) in COMMANDS.items():
        table.add_row(f"[bold]{name}[/bold]", line)
    _output.out.print(table)
    footer = "\n`farspan <command> --help` lists the options; `--debug` anywhere shows the traceback of an error."
    _output.out.print(footer, highlight=False, markup=False)


if __name__ == "__main__":
    sys.exit(main())
