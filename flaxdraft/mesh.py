"""The device mesh and where each array lives on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import P

from flaxdraft.errors import InputError

BATCH_AXIS = "data"


@dataclasses.dataclass(frozen=True)
class Sharding:
    """Where each logical array lives; the field suffix names its dims. `None` leaves the choice to JAX."""

    act_b: P | None = None
    act_btd: P | None = None

    @classmethod
    def none(cls) -> Sharding:
        """One device, no mesh."""
        return cls()

    @classmethod
    def data_parallel(cls, axis: str = BATCH_AXIS) -> Sharding:
        """Weights replicated, rows of the batch split over one axis."""
        return cls(P(axis), P(axis, None, None))


def make_mesh(data: int) -> jax.sharding.Mesh:
    """A mesh of explicit axes over the first `data` devices.

    Raises:
        InputError: fewer devices are visible.
    """
    if data > jax.device_count():
        raise InputError(
            f"mesh.data: {data} devices were asked for, {jax.device_count()} are visible ({jax.default_backend()})"
        )
    return jax.make_mesh((data,), (BATCH_AXIS,), devices=jax.devices()[:data])


def per_shard(local: Callable[..., tuple[Any, Any]], split: tuple, whole: tuple = ()) -> tuple[Any, Any]:
    """rows, sums = local(*split, *whole) on each device's own rows; sums are then added up over devices.

    Loops whose length depends on the data, and compaction, stay inside a shard: nothing is gathered across devices.

    Args:
        split: arrays (or trees of them) whose first axis is the batch, like those of the returned rows.
        whole: arrays that every device holds whole.
    """
    spec = jax.typeof(jax.tree.leaves(split)[0]).sharding.spec
    if not len(spec) or spec[0] is None:
        return local(*split, *whole)
    axis = spec[0]

    def summed(*args):
        rows, sums = local(*args)
        return rows, jax.tree.map(lambda x: jax.lax.psum(x, axis), sums)

    specs = (jax.P(axis),) * len(split) + (jax.P(),) * len(whole)
    return jax.shard_map(summed, in_specs=specs, out_specs=(jax.P(axis), jax.P()), check_vma=False)(*split, *whole)
