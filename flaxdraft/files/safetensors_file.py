"""Safetensors files: written whole, read whole, or mapped into memory: any slice of any tensor without the rest of it.

The format (https://github.com/huggingface/safetensors): 8 bytes of header length, little-endian; a JSON header of
{name: {dtype, shape, data_offsets}}; the tensors. The safetensors package itself reads no float8 into numpy.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flaxdraft.errors import InputError

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip
_MAX_HEADER = 100_000_000  # the format's own limit


class Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    start: int  # in the file
    stop: int


class SafetensorsFile:
    """Tensors by name; slices are views of the mapped file."""

    def __init__(self, path: Path):
        """
        Raises:
            InputError: not a safetensors file, or truncated or altered in its header.
        """
        self.path = path
        try:
            self._bytes = np.asarray(np.memmap(path, np.uint8, mode="r"))
            size = len(self._bytes)
            length = int.from_bytes(self._bytes[:8].tobytes(), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise ValueError(f"{size} bytes, a header of {length} was announced")
            header = json.loads(self._bytes[8 : 8 + length].tobytes().decode("utf-8"))
            header.pop("__metadata__", None)
            self.entries = {name: _entry(name, record, 8 + length, size) for name, record in header.items()}
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise InputError(
                f"{path}: not a readable safetensors file ({error}); it was cut or altered: fetch it again"
            ) from error

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A view of that part of a tensor.

        Raises:
            InputError: it is stored as a type that no weight has.
        """
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise InputError(
                f"{self.path}: {name} is stored as {entry.dtype}; expected one of {', '.join(sorted(DTYPES))}"
            )
        return self._bytes[entry.start : entry.stop].view(DTYPES[entry.dtype]).reshape(entry.shape)[index]

    def read_bytes(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A view of that part of a tensor of bytes, into which a format has put something else.

        Raises:
            InputError: it is stored as another type.
        """
        entry = self.entries[name]
        if entry.dtype != "U8":
            raise InputError(f"{self.path}: {name} is stored as {entry.dtype}, expected U8; fetch the model again")
        return self._bytes[entry.start : entry.stop].reshape(entry.shape)[index]


_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
         "F8_E4M3": 8, "F8_E5M2": 8, "I8": 8, "U8": 8, "BOOL": 8, "F8_E8M0": 8, "F4": 4}  # fmt: skip


def _entry(name: str, record: Any, data: int, size: int) -> Entry:
    start, stop = record["data_offsets"]
    shape = tuple(record["shape"])
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(f"{name} has shape {shape} at {start}..{stop}")
    if not start <= stop <= size - data:
        raise ValueError(f"{name} lies at {data + start}..{data + stop} of {size} bytes")
    if record["dtype"] in _BITS and math.prod(shape) * _BITS[record["dtype"]] != (stop - start) * 8:
        raise ValueError(f"{name} of shape {shape} does not fill {stop - start} bytes")
    return Entry(record["dtype"], shape, data + start, data + stop)


def save_safetensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Writes to a temporary name, then renames: a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata=metadata)
    # safetensors makes files that their owner alone can read; a server often runs as somebody else.
    os.umask(umask := os.umask(0))
    temporary.chmod(0o666 & ~umask)
    os.replace(temporary, path)


def load_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of one file.

    Raises:
        InputError: no such file, it is truncated or altered in its header, or holds a type that numpy has not.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); remove it and make it again") from error
    return {name: load_tensor(path, name) for name in names}


def load_tensor(path: Path, name: str) -> np.ndarray:
    """One tensor of a file.

    Raises:
        InputError: see `load_safetensors`.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            if not str(file.get_slice(name).get_dtype()).startswith("F8"):
                return file.get_tensor(name)
    except (OSError, SafetensorError, TypeError, AttributeError) as error:  # of types that it does not know
        raise InputError(f"{path}: {name} cannot be read ({error}); remove the file and make it again") from error
    return SafetensorsFile(path).read(name, ()).copy()
