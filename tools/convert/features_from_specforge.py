"""SpecForge's hidden states as a feature store to train on.

    python tools/convert/features_from_specforge.py DIR STORE --target /models/Qwen3-8B

DIR holds `.ckpt` or `.ckpt.gz` files, at any depth. Where it has vocab_mapping/vocab_mapping.pt, that is written to
STORE.d2t.npy: `draft.vocab_map=STORE.d2t.npy` trains with it. Needs PyTorch: pip install -e ".[convert]".
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import ingest_command
import numpy as np
from specforge_files import SpecForgeFolder, vocabulary_offsets

from flaxdraft.progress import CONSOLE


def main(argv: list[str] | None = None) -> int:
    """See `ingest_command.main`."""
    return ingest_command.main(__doc__, SpecForgeFolder, argv, beside=write_map)


def write_map(folder: Path, store: Path) -> None:
    """The draft vocabulary, if the folder has one, beside the store.

    Raises:
        InputError: see `vocabulary_offsets`.
    """
    d2t = vocabulary_offsets(folder)
    if d2t is None:
        return
    path = store.with_name(store.name + ".d2t.npy")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.save(file, d2t)
    os.replace(temporary, path)
    CONSOLE.print(f"a draft vocabulary of {len(d2t)} tokens: draft.vocab_map={path}")


if __name__ == "__main__":
    sys.exit(main())
