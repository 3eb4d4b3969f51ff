"""One array of a state, and the tensors of a file that it is made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

Transform = Literal["copy", "transpose"]
_ROWS = 64
_ALIGNMENT = 64  # bytes


class TensorSource(Protocol):
    """Named tensors of a file or a directory, read piece by piece, by several threads at a time."""

    @property
    def origin(self) -> str:
        """For messages."""
        ...

    def names(self) -> Iterable[str]:
        """In the order in which they lie in the files, where there is one."""
        ...

    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """That part of a tensor, and no more of it where the format allows."""
        ...


class Leaf(NamedTuple):
    """One array; its first axes are stacked layers, and experts, one tensor each."""

    path: tuple[str, ...]
    keys: np.ndarray  # of str, one axis for each stacked one
    shape: tuple[int, ...]
    dtype: Any
    transform: Transform

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Of each tensor in the file."""
        return self.in_file(self.shape[self.keys.ndim :])

    @property
    def row_axis(self) -> int:
        """The axis of the array that is the first one of the tensors: parts of it lie together in the file."""
        return len(self.shape) - 1 if self.transform == "transpose" else self.keys.ndim

    def in_file(self, inner: tuple) -> tuple:
        """Something of each axis behind the stacked ones, in the tensors' order."""
        return inner[::-1] if self.transform == "transpose" else inner

    def read_one(self, source: TensorSource, bounds: tuple[slice, ...]) -> np.ndarray:
        """A part of the array that is of one tensor, in the tensor's dtype."""
        stacked = self.keys.ndim
        key = self.keys[tuple(bound.start for bound in bounds[:stacked])] if stacked else self.keys[()]
        part = source.read(str(key), self.in_file(bounds[stacked:]))
        out = np.empty(self.in_file(part.shape), part.dtype)
        _copy(out, part, self.transform)
        return out[(None,) * stacked]

    def read_all(self, source: TensorSource, bounds: tuple[slice, ...]) -> np.ndarray:
        """A part of the array."""
        out = _aligned([bound.stop - bound.start for bound in bounds], np.dtype(self.dtype))
        stacked = self.keys.ndim
        index = self.in_file(bounds[stacked:])
        keys = self.keys[bounds[:stacked]] if stacked else self.keys
        for at in np.ndindex(keys.shape):
            _copy(out[at], source.read(str(keys[at]), index), self.transform)
        return out


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Memory that JAX's CPU devices take over as it is."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _copy(out: np.ndarray, part: np.ndarray, transform: Transform) -> None:
    """Equal dtypes are copied as bits, since numpy copies bfloat16 with the interpreter's lock held; a few rows at a
    time, since numpy transposes a large matrix column by column, which misses the cache at every value."""
    if out.dtype == part.dtype:
        out, part = (x.view(f"u{x.itemsize}") for x in (out, part))
    if transform == "copy":
        out[...] = part
        return
    for row in range(0, len(part), _ROWS):
        out[:, row : row + _ROWS] = part[row : row + _ROWS].T
