"""Weights from a file into their places on the devices. However large a tensor or a stack of layers is, only a few
pieces of it are in memory beside the arrays themselves.

Threads read ahead, in the order of the files. A small array is made on the host; a larger one is made on its devices
and filled there piece by piece: each device gets its part of a tensor in the file's dtype, and casts it. CPU devices
take over what the host has made.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flaxdraft.devices.per_device import per_device
from flaxdraft.devices.sharding import spec_of
from flaxdraft.files.leaves import Leaf, TensorSource
from flaxdraft.progress import bar

PIECE = 1 << 23  # values that are read at a time, for all devices of this process together
READERS = 8  # pieces that are in memory at a time

Places = Mapping[tuple[str, ...], jax.NamedSharding]


class _Piece(NamedTuple):
    """What is read at a time: the same part of every device's part of an array."""

    leaf: Leaf
    place: jax.NamedSharding | None
    size: tuple[int, ...]  # on each device
    at: tuple[int, ...]  # of its beginning in each device's part
    whole: bool  # of each device's part

    def parts(self) -> dict[tuple[int, ...], list[Any]]:
        """Devices of this process, by where in the array the piece begins for them."""
        if self.place is None:
            return {self.at: [None]}
        parts: dict[tuple[int, ...], list[Any]] = {}
        for device, index in self.place.addressable_devices_indices_map(self.leaf.shape).items():
            assert index is not None, "a device of another process"
            starts = [own.indices(size)[0] for own, size in zip(index, self.leaf.shape, strict=True)]
            parts.setdefault(tuple(s + a for s, a in zip(starts, self.at, strict=True)), []).append(device)
        return parts

    @property
    def num_values(self) -> int:
        return math.prod(self.size) * len(self.parts())

    def read(self, source: TensorSource) -> list[tuple[np.ndarray, list[Any]]]:
        """Equal parts of several devices are read once."""
        read = self.leaf.read_all if self.whole else self.leaf.read_one
        return [
            (read(source, tuple(slice(b, b + n) for b, n in zip(begin, self.size, strict=True))), devices)
            for begin, devices in self.parts().items()
        ]

    def sent(self, parts: list[tuple[np.ndarray, list[Any]]]) -> jax.Array:
        """One array over the devices, laid out like the whole one."""
        if self.place is None:
            return jax.device_put(parts[0][0])
        arrays = [jax.device_put(part, device) for part, devices in parts for device in devices]
        own = self.place.shard_shape(self.leaf.shape)
        shape = tuple(n // o * size for n, o, size in zip(self.leaf.shape, own, self.size, strict=True))
        return jax.make_array_from_single_device_arrays(shape, self.place, arrays)


def stream(
    leaves: Sequence[Leaf], source: TensorSource, places: Places | None, title: str | None
) -> dict[Any, jax.Array]:
    """The arrays by their paths, all of which have arrived.

    Args:
        places: where each lives; where None, on the default device, free to be moved by what uses it.
        title: of a bar of this process's part, in MB as they are kept; None shows none.
    """
    of = lambda leaf: None if places is None else places[leaf.path]  # noqa: E731
    pieces = _in_file_order([piece for leaf in leaves for piece in _pieces(leaf, of(leaf))], source)
    num_bytes = sum(piece.num_values * piece.leaf.dtype.itemsize for piece in pieces)
    filled: dict[Any, jax.Array] = {}
    mesh = next(iter(places.values())).mesh if places else None
    with contextlib.ExitStack() as stack:
        progress = None if title is None else stack.enter_context(bar(f"{title}, MB", round(num_bytes / 1e6)))
        if isinstance(mesh, jax.sharding.Mesh):
            stack.enter_context(jax.set_mesh(mesh))
        start, done = time.monotonic(), 0
        for piece, parts in _read_ahead(pieces, source):
            path, sent = piece.leaf.path, piece.sent(parts)
            if not piece.whole:
                array = filled.pop(path) if path in filled else _empty(piece)
                sent = _put(array, sent, piece.at)
            filled[path] = jax.block_until_ready(sent)  # the host's copy may be let go only now
            size = piece.num_values * piece.leaf.dtype.itemsize
            done += size
            if progress is not None:
                progress.advance(size / 1e6, f"{done / (time.monotonic() - start) / 1e9:.2f} GB/s")
    return filled


def _pieces(leaf: Leaf, place: jax.NamedSharding | None) -> Iterator[_Piece]:
    own = leaf.shape if place is None else place.shard_shape(leaf.shape)
    whole = _Piece(leaf, place, own, (0,) * len(own), True)
    if whole.num_values <= PIECE or _on_host(place):
        yield whole
        return
    stacked, axis, num_rows = leaf.keys.ndim, leaf.row_axis, own[leaf.row_axis]
    row = math.prod(own[stacked:]) // num_rows * len(whole.parts())
    count = math.ceil(num_rows / max(PIECE // row, 1))
    rows = math.ceil(num_rows / count)  # of every piece; the last one begins where the others leave it as many
    size = tuple(1 if i < stacked else rows if i == axis else n for i, n in enumerate(own))
    for at in np.ndindex(*own[:stacked]):
        for k in range(count):
            inner = [0] * (len(own) - stacked)
            inner[axis - stacked] = min(k * rows, num_rows - rows)
            yield _Piece(leaf, place, size, (*at, *inner), False)


def _on_host(place: jax.NamedSharding | None) -> bool:
    """Whether the devices' memory is the host's: then they take what is made there, and nothing is copied."""
    device = jax.devices()[0] if place is None else next(iter(place.device_set))
    return device.platform == "cpu"


def _in_file_order(pieces: list[_Piece], source: TensorSource) -> list[_Piece]:
    order = {name: i for i, name in enumerate(source.names())}

    def position(piece: _Piece) -> int:
        keys = piece.leaf.keys
        return order[str(keys[next(iter(piece.parts()))[: keys.ndim]])]

    return sorted(pieces, key=position)


def _read_ahead(pieces: Sequence[_Piece], source: TensorSource) -> Iterator[tuple[_Piece, list]]:
    """Each piece with what was read of it; at most READERS of them are in memory."""
    left, reading = iter(pieces), deque()
    with ThreadPoolExecutor(READERS, "weights") as threads:
        try:
            for piece in pieces:
                while len(reading) < READERS and (following := next(left, None)) is not None:
                    reading.append(threads.submit(following.read, source))
                yield piece, reading.popleft().result()
        finally:
            for future in reading:
                future.cancel()


def _empty(piece: _Piece) -> jax.Array:
    """Zeros, each device's made there."""
    make = jax.jit(partial(jnp.zeros, piece.leaf.shape, piece.leaf.dtype), out_shardings=piece.place)
    return make()


@partial(jax.jit, donate_argnames=("array",))
def _put(array, piece, at):
    """The array with a piece at `at` of each device's part."""

    def local(array, piece, *at):
        return lax.dynamic_update_slice(array, piece.astype(array.dtype), at)

    return per_device(local, spec_of(array), array, piece, *at)
