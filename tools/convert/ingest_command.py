"""The command line that the ingest tools share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flaxdraft import algorithms
from flaxdraft.run.commands import Command, at_least, call

if TYPE_CHECKING:
    from flaxdraft.data.ingest import Folder


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="of hidden states")
    parser.add_argument("store", type=Path, help="a folder for the feature store; the same one goes on")
    parser.add_argument("--target", required=True, help="the model whose hidden states these are; as target.path")
    parser.add_argument("--algorithm", default=algorithms.DEFAULT, help="whose default layers were kept")
    parser.add_argument(
        "--tap-layers", type=int, nargs="+", metavar="LAYER",
        help="the layers (0-based) whose outputs were kept, in place of the default; vLLM and SGLang count inputs, "
             "which is one more",
    )  # fmt: skip
    parser.add_argument("--shard-tokens", type=at_least(1), default=16384, help="of one file, about")


def main(
    description: str | None, open_folder: Callable[[Path], Folder], argv: Sequence[str] | None,
    beside: Callable[[Path, Path], None] | None = None,
) -> int:  # fmt: skip
    """0 when the store is complete; 2 with one message for wrong input.

    Args:
        open_folder: makes an `ingest.Folder` of a directory.
        beside: called with the folder and the store when that is complete.
    """

    def work(arguments: argparse.Namespace) -> None:
        from flaxdraft import targets
        from flaxdraft.data.ingest import ingest

        folder = open_folder(arguments.folder)
        opened = targets.open_target(arguments.target)
        taps = algorithms.tap_layers(arguments.algorithm, opened.config(), arguments.tap_layers)
        ingest(arguments.store, folder, opened, taps, arguments.shard_tokens)
        if beside is not None:
            beside(arguments.folder, arguments.store)

    return call(Command(description, _arguments, work), argv)
