"""Answered rows with their features on disk: one safetensors file for each decoded chunk.

Rows lie end to end; `lengths` and `num_prompt` cut them apart. A file is written under a temporary name and renamed,
so that what is there is whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from flaxdraft.data.documents import Answer
from flaxdraft.errors import InputError
from flaxdraft.files.safetensors_file import load_safetensors, save_safetensors
from flaxdraft.interfaces import Features

# What each field of `Features` is called in a file, as the first files called it.
_TENSORS = {
    "taps_BTKE": "taps_BT3E", "last_BTE": "last_BTE", "argmax_BT": "argmax_BT", "logsumexp_BT": "logsumexp_BT",
}  # fmt: skip
_NARROW = ("taps_BTKE", "last_BTE")  # the wide ones are stored in the configured dtype
_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def write_rows(path: Path, rows: Sequence[Answer], dtype: str) -> None:
    """One chunk of rows; taps and last hidden states in `dtype`, the rest as it is."""
    tensors = {
        "tokens": np.concatenate([row.tokens for row in rows]),
        "lengths": np.array([len(row.tokens) for row in rows], np.int32),
        "num_prompt": np.array([row.num_prompt for row in rows], np.int32),
    }
    for field, name in _TENSORS.items():
        joined = np.concatenate([getattr(row.features, field) for row in rows])
        tensors[name] = joined.astype(_DTYPES[dtype]) if field in _NARROW else joined
    save_safetensors(path, tensors)


def read_rows(path: Path) -> list[Answer]:
    """The rows of one chunk.

    Raises:
        InputError: the file is damaged, its arrays disagree about their length, or a feature is not finite.
    """
    tensors = load_safetensors(path)
    names = {"tokens", "lengths", "num_prompt", *_TENSORS.values()}
    if names != set(tensors):
        raise InputError(f"{path}: found tensors {sorted(tensors)}, expected {sorted(names)}; remove it and run again")
    total = int(tensors["lengths"].sum())
    for name in names - {"lengths", "num_prompt"}:
        if len(tensors[name]) != total:
            raise InputError(
                f"{path}: {name} has {len(tensors[name])} rows, lengths say {total}; remove it and run again"
            )
    if len(tensors["num_prompt"]) != len(tensors["lengths"]):
        raise InputError(
            f"{path}: num_prompt has {len(tensors['num_prompt'])} rows, lengths has {len(tensors['lengths'])}; "
            "remove it and run again"
        )
    for name in (_TENSORS[field] for field in _NARROW):
        if not np.isfinite(tensors[name]).all():
            raise InputError(f"{path}: {name} holds values that are not finite; remove it and run again")
    ends = np.cumsum(tensors["lengths"])
    rows = []
    for start, end, num_prompt in zip(ends - tensors["lengths"], ends, tensors["num_prompt"], strict=True):
        features = Features(**{field: tensors[name][start:end] for field, name in _TENSORS.items()})
        rows.append(Answer(tensors["tokens"][start:end], int(num_prompt), features))
    return rows
