"""A draft as engines see it: config.json and named tensors, on disk or about to be written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flaxdraft.errors import InputError
from flaxdraft.files.gguf_file import GGUFCheckpoint
from flaxdraft.files.hugging_face import INDEX, SINGLE
from flaxdraft.files.json_files import read_json_object
from flaxdraft.files.safetensors_file import SafetensorsFile, load_tensor
from flaxdraft.targets import open_target

_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "BOOL": "bool",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DraftView:
    """Everything a rule may look at."""

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]  # numpy's names, the file's own where numpy has none
    read: Callable[[str], np.ndarray]
    target: Mapping[str, Any] | None = None  # the target's config.json, where it is known
    twice: tuple[str, ...] = ()  # tensors that two files hold
    target_rows: Callable[[slice], np.ndarray] | None = None  # of the target's embedding, where its weights are there


def view_of_arrays(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], target: Mapping[str, Any] | None
) -> DraftView:
    shapes = {name: array.shape for name, array in tensors.items()}
    dtypes = {name: array.dtype.name for name, array in tensors.items()}
    return DraftView(config, shapes, dtypes, tensors.__getitem__, target)


def view_of_directory(
    directory: Path, target: Mapping[str, Any] | None = None, target_rows: Callable[[slice], np.ndarray] | None = None
) -> DraftView:
    """The headers are read, each tensor when a rule asks for it.

    Raises:
        InputError: no config.json, no safetensors, or one of them cannot be read.
    """
    config = read_config(directory / "config.json")
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise InputError(
            f"{directory}: no *.safetensors; expected a draft's directory (for PyTorch files see "
            "tools/convert/from_pytorch.py)"
        )
    where: dict[str, Path] = {}
    shapes, dtypes, twice = {}, {}, []
    for path in paths:
        for name, entry in SafetensorsFile(path).entries.items():
            if name in where:
                twice.append(name)
            where[name], shapes[name] = path, entry.shape
            dtypes[name] = _NAMES.get(entry.dtype, entry.dtype)

    def read(name: str) -> np.ndarray:
        return load_tensor(where[name], name)

    return DraftView(config, shapes, dtypes, read, target, tuple(twice), target_rows)


def read_config(path: Path) -> dict[str, Any]:
    """
    Raises:
        InputError: missing, not JSON, or not an object.
    """
    return read_json_object(path, "expected a draft's config.json", "write it again")


def read_target_rows(path: Path) -> Callable[[slice], np.ndarray] | None:
    """Reads rows of a target's embedding; None where a directory holds no weights, or none that can be read: quantised
    ones, or those of a family that is not known."""
    if path.is_dir() and not any((path / name).exists() for name in (SINGLE, INDEX)):
        return None
    try:
        opened = open_target(str(path))
        (name,) = [name for part, name, _ in opened.family.name_table(opened.config()) if part == "embed"]
        width = opened.source.shape(name)[1]
    except InputError:
        return None
    return lambda rows: opened.source.read(name, (rows, slice(0, width)))


def read_target_config(path: Path) -> dict[str, Any]:
    """A target's configuration, without its weights.

    Raises:
        InputError: neither a directory with config.json nor a .gguf file.
    """
    return GGUFCheckpoint(path).config if path.suffix == ".gguf" else read_config(path / "config.json")
