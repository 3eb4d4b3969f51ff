"""A feature store as SpecForge's hidden states, bit by bit.

    python tools/convert/features_to_specforge.py STORE DIR

Writes DIR/rows_0-2000/data_0.ckpt and so on. A store with fp8 taps is refused, since SpecForge has no such thing. Needs
PyTorch: pip install -e ".[convert]".
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]  # of the extra `convert` alone
from specforge_files import ROWS_IN_A_FOLDER, as_torch

from flaxdraft.data.store import FeatureStore
from flaxdraft.errors import InputError
from flaxdraft.progress import CONSOLE, bar
from flaxdraft.run.commands import Command, call


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, help="a feature store")
    parser.add_argument("folder", type=Path, help="for SpecForge's files; those that are there stay")


def main(argv: list[str] | None = None) -> int:
    """0 when every row is written; 2 with one message for wrong input."""
    work = lambda arguments: write(FeatureStore(arguments.store), arguments.folder)  # noqa: E731
    return call(Command(__doc__, _arguments, work), argv)


def write(store: FeatureStore, directory: Path) -> None:
    """
    Raises:
        InputError: the store's taps are fp8; a row is damaged.
    """
    if store.manifest["taps_dtype"] == "fp8":
        raise InputError(f"{store.directory}: taps_dtype is fp8; SpecForge's files hold bfloat16 or float32")
    with bar("rows", len(store)) as progress:
        for index in range(len(store)):
            first = index // ROWS_IN_A_FOLDER * ROWS_IN_A_FOLDER
            path = directory / f"rows_{first}-{first + ROWS_IN_A_FOLDER}" / f"data_{index}.ckpt"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(path.name + ".tmp")
                torch.save(_record(store, index), temporary)
                os.replace(temporary, path)
            progress.advance(1, "")
    CONSOLE.print(f"{len(store)} rows: {directory}")


def _record(store: FeatureStore, index: int) -> dict[str, torch.Tensor]:
    row = store.row(index)
    assert row.features is not None, "a store keeps them"
    assert row.features.last_BTE is not None, "a store keeps them"
    taps, last = row.features.taps_BTKE, row.features.last_BTE
    return {
        "input_ids": torch.from_numpy(row.tokens.astype(np.int64)),
        "loss_mask": torch.from_numpy(row.assistant.astype(np.int64)),
        "aux_hidden_state": as_torch(taps.reshape(1, len(taps), -1)),
        "hidden_state": as_torch(last[None]),
    }


if __name__ == "__main__":
    sys.exit(main())
