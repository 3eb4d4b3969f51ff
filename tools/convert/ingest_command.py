"""The command line that the ingest tools share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from flaxdraft.errors import InputError


def main(
    description: str, open_folder: Callable[[Path], object], argv: list[str] | None,
    beside: Callable[[Path, Path], None] | None = None,
) -> int:  # fmt: skip
    """0 when the store is complete; 2 with one message for wrong input.

    Args:
        open_folder: makes an `ingest.Folder` of a directory.
        beside: called with the folder and the store when that is complete.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of hidden states")
    parser.add_argument("store", type=Path, help="a folder for the feature store; the same one goes on")
    parser.add_argument("--target", required=True, help="the model whose hidden states these are; as target.path")
    parser.add_argument(
        "--tap-layers", type=int, nargs=3, metavar="LAYER",
        help="the layers (0-based) whose outputs were kept, the default ones where left out; vLLM and SGLang count "
             "inputs, which is one more",
    )  # fmt: skip
    parser.add_argument("--shard-tokens", type=int, default=16384, help="of one file, about")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        from flaxdraft import targets
        from flaxdraft.data.ingest import ingest

        folder = open_folder(arguments.folder)
        opened = targets.open_target(arguments.target)
        ingest(arguments.store, folder, opened, arguments.tap_layers, arguments.shard_tokens)
        if beside is not None:
            beside(arguments.folder, arguments.store)
    except InputError as error:
        print(f"flaxdraft: {error}", file=sys.stderr)
        return 2
    return 0
