"""One array of a state, and the tensors of a file that it is made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

Transform = Literal["copy", "transpose"]


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
        """A part of one tensor as it lies in the file, with an axis of 1 for each stacked one. It is in memory, and not
        a view of the file: who copies it to a device does not wait for the disk."""
        stacked = self.keys.ndim
        key = self.keys[tuple(bound.start for bound in bounds[:stacked])] if stacked else self.keys[()]
        part = source.read(str(key), self.in_file(bounds[stacked:]))
        bits = part.view(f"u{part.itemsize}")  # numpy copies bfloat16 with the interpreter's lock held
        return np.require(bits, requirements="CO").view(part.dtype)[(None,) * stacked]

    def read_all(self, source: TensorSource, bounds: tuple[slice, ...]) -> np.ndarray:
        """A part of the array, made on the host."""
        out = np.empty([bound.stop - bound.start for bound in bounds], self.dtype)
        stacked = self.keys.ndim
        index = self.in_file(bounds[stacked:])
        keys = self.keys[bounds[:stacked]] if stacked else self.keys
        for at in np.ndindex(keys.shape):
            out[at] = apply(source.read(str(keys[at]), index), self.transform)
        return out


def apply(array: np.ndarray, transform: Transform) -> np.ndarray:
    return array.T if transform == "transpose" else array
