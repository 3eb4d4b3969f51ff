"""Command lines: how they are parsed, how they end, and `flaxdraft`, which calls them by name.

0, done; 2, wrong input, with one message; a command may give other codes of its own. A traceback is a bug.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from flaxdraft.errors import InputError

ADDRESS = "a model directory, a .gguf file, wheel:NAME==VERSION/FILE, or ORG/NAME"
_ROOMS = ("train", "data", "evaluate", "targets")  # each with a __main__
_TOOLS = Path(__file__).parents[2] / "tools" / "convert"  # of a clone; an installed wheel has none


class Command(NamedTuple):
    """One command, or one of several behind a common name."""

    help: str | None  # one line, or a module's text
    arguments: Callable[[argparse.ArgumentParser], None]  # adds them
    work: Callable[[argparse.Namespace], int | None]  # an exit code other than 0, if any


def call(command: Command, argv: Sequence[str] | None, prog: str | None = None) -> int:
    """Parses and works; the exit code."""
    parser = argparse.ArgumentParser(
        prog=prog, description=command.help, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.arguments(parser)
    return _work(parser.parse_args(argv), command.work)


def call_one_of(commands: dict[str, Command], argv: Sequence[str] | None, prog: str, text: str | None) -> int:
    """The command that the first argument names."""
    parser = argparse.ArgumentParser(prog=prog, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = parser.add_subparsers(required=True, metavar=" | ".join(commands))
    for name, command in commands.items():
        own = choices.add_parser(name, help=command.help)
        command.arguments(own)
        own.set_defaults(work=command.work)
    arguments = parser.parse_args(argv)
    return _work(arguments, arguments.work)


def _work(arguments: argparse.Namespace, work: Callable[[argparse.Namespace], int | None]) -> int:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install PyTorch
    try:
        return work(arguments) or 0
    except InputError as error:
        print(f"flaxdraft: {error}", file=sys.stderr)
        return 2


def at_least(least: int) -> Callable[[str], int]:
    """Makes a `type` of argparse that takes whole numbers from `least` on.

    Raises:
        argparse.ArgumentTypeError: (what is returned) it is something else.
    """

    def number(text: str) -> int:
        with contextlib.suppress(ValueError):
            if (value := int(text)) >= least:
                return value
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number from {least} on")

    return number


def share(text: str) -> float:
    """A number from 0 to 1, as a `type` of argparse.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) <= 1:
            return value
    raise argparse.ArgumentTypeError(f"found {text!r}, expected a share from 0 to 1")


def flaxdraft(argv: Sequence[str] | None = None) -> int:
    """`flaxdraft NAME ...`: the same as `python -m flaxdraft.NAME ...`, and `flaxdraft convert TOOL ...` for the tools
    of a clone."""
    name, *rest = sys.argv[1:] or ["--help"] if argv is None else argv
    if name in _ROOMS:
        return importlib.import_module(f"flaxdraft.{name}.__main__").main(rest)
    tools = sorted(path.stem for path in _TOOLS.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
    if name == "convert" and rest and rest[0] in tools:
        sys.argv = [str(_TOOLS / f"{rest[0]}.py"), *rest[1:]]
        sys.path.insert(0, str(_TOOLS))
        runpy.run_path(sys.argv[0], run_name="__main__")
    listed = ", ".join(tools) or "none here: they come with a clone of the repository"
    print(f"usage: flaxdraft {' | '.join(_ROOMS)} | convert TOOL ...\n  tools: {listed}", file=sys.stderr)
    return 0 if name in ("-h", "--help") else 2
