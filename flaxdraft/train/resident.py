"""What the devices hold while a draft trains, and what helps first where that is too much."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax

_UNITS = {"bytes": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_ASKED = re.compile(r"allocate\s+([\d.]+)\s*(bytes|B|KiB|MiB|GiB|TiB)\b")
# What helps first where a part is the largest.
HELP = {
    "target": "split the target over more devices (mesh.fsdp, or target.mesh for the target alone)",
    "draft": "split the weights over more devices (mesh.fsdp)",
    "moments": "split the optimizer's moments, which lie where the weights do, over more devices (mesh.fsdp)",
    "features": "lower train.batch_size, or the length of rows (train.pack_length, data.max_length)",
    "caches": "lower data.rows, the answers at a time",
    "answers' features": "lower data.rows, the answers at a time",
    "batch": "lower train.batch_size, or the length of rows (train.pack_length, data.max_length)",
    "work": "raise train.accumulate, or set algorithm.remat=full",
    "other arrays": "end the run and start it again: stages that are done keep nothing on the device",
}


class Resident:
    """The parts that a run names, by shape and place alone: nothing is kept alive for it."""

    def __init__(self) -> None:
        self._parts: dict[str, Any] = {}

    def note(self, **parts: Any) -> None:
        """Arrays by what they are: target, draft, moments, batch. A target that is no tree of arrays counts nothing."""
        self._parts |= {
            name: [
                jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
                for x in jax.tree.leaves(tree) if isinstance(x, jax.Array | jax.ShapeDtypeStruct)
            ] for name, tree in parts.items()
        }  # fmt: skip

    def describe(self, message: str) -> str:
        """Of the fullest device of this process: each part's size and the first thing that helps.

        Args:
            message: the runtime's, of which the size is taken that it asked for.
        """
        parts = {name: _bytes_by_device(arrays) for name, arrays in self._parts.items()}
        live = _live_bytes()
        device = max(jax.local_devices(), key=lambda d: live.get(d, 0))
        sizes = {name: held.get(device, 0) for name, held in parts.items()}
        sizes["other arrays"] = max(live.get(device, 0) - sum(sizes.values()), 0)
        sizes["work"] = _asked(message)
        sizes = {name: size for name, size in sizes.items() if size}
        limit = (device.memory_stats() or {}).get("bytes_limit")
        of = "" if limit is None else f" of {limit / 1e9:.2f} GB"
        listed = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in sizes.items())
        first = max(sizes, key=lambda name: sizes[name]) if sizes else "work"
        return f"on {device}{of}: {listed} (work: what was asked for). First, {HELP[first]}"


def _bytes_by_device(arrays: list[jax.ShapeDtypeStruct]) -> Mapping[Any, int]:
    """Of each device of this process: its shards."""
    held: dict[Any, int] = {}
    for x in arrays:
        assert x.sharding is not None, "arrays of a run have a place"
        size = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for device in x.sharding.addressable_devices:
            held[device] = held.get(device, 0) + size
    return held


def _live_bytes() -> Mapping[Any, int]:
    """Of everything that JAX holds; what several arrays share is counted once."""
    held: dict[Any, dict[int, int]] = {}
    for x in jax.live_arrays():
        for shard in x.addressable_shards:
            held.setdefault(shard.device, {})[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return {device: sum(sizes.values()) for device, sizes in held.items()}


def _asked(message: str) -> int:
    """Bytes; 0 where the message does not say."""
    found = _ASKED.search(message)
    return 0 if found is None else int(float(found[1]) * _UNITS[found[2]])
