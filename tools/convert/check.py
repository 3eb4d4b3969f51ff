"""Looks at a draft's directory, ours or another trainer's, as each serving engine would.

    python tools/convert/check.py runs/quickstart/llama/export
    python tools/convert/check.py DRAFT --target /models/Qwen3-8B --engine sglang --json

The table has one block for the directory itself and one an engine: whether it loads the draft; what it would do, where

    refused  it stops with an error,
    wrong    it serves, in silence, another network than the one that was trained (accept length falls),
    note     nothing comes of it, but it is worth knowing;

and how to mend it. With --target (a model directory or a .gguf file) sizes, rotary embedding, context and tapped layers
are compared with the target's, and an embedding that lies in the draft's directory with the target's own, of whose
weights nothing else is read. Where it cannot be read (quantised weights, a family that is not known), a note says so.

Exit code: 0 where the directory and the engines asked for (--engine, by default sglang and vllm) have nothing but
notes, 1 where they have more, 2 where the directory cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from flaxdraft.errors import InputError
from flaxdraft.run.commands import Command, call


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, help="config.json and *.safetensors of a draft")
    parser.add_argument("--target", type=Path, help="the target's directory or .gguf file")
    parser.add_argument("--engine", action="append", default=[], help="that the exit code is about; may be repeated")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON instead of a table")


def main(argv: list[str] | None = None) -> int:
    """See the module's text."""
    return call(Command(__doc__ or "", _arguments, _work), argv)


def _work(arguments: argparse.Namespace) -> int:
    from flaxdraft.algorithms.loading import contract_of
    from flaxdraft.progress import CONSOLE
    from flaxdraft.serving import lint
    from flaxdraft.serving.contract import find_engine
    from flaxdraft.serving.view import read_target_config, read_target_rows, view_of_directory

    target = rows = None
    if arguments.target is not None:
        target, rows = read_target_config(arguments.target), read_target_rows(arguments.target)
    view = view_of_directory(arguments.directory, target, rows)
    contract = contract_of(view.config)
    for name in arguments.engine:
        if not find_engine(contract, name).serves:
            raise InputError(f"engine: {name} serves nothing; the directory's own block is about it")
    verdicts = lint.check(view, contract)
    if arguments.json:
        print(json.dumps(lint.as_json(verdicts), indent=2))
    else:
        CONSOLE.print(lint.as_table(verdicts))
    return 0 if lint.passes(verdicts, arguments.engine) else 1


if __name__ == "__main__":
    sys.exit(main())
