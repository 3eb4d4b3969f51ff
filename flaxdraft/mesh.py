"""The device mesh and where each array lives on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import P

from flaxdraft.errors import InputError

BATCH_AXIS = "data"
REDUCED = P()


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


def gradient_spec(weight: jax.Array) -> P:
    """Where the gradient of a weight that every device holds whole lives: unreduced over the axes that the weight's
    type calls reduced, so that whoever accumulates gradients adds them up over devices once; else reduced at once."""
    reduced = jax.typeof(weight).sharding.spec.reduced
    return P(unreduced=reduced) if reduced else P()


def per_shard(
    local: Callable[..., tuple[Any, Any]], split: tuple, whole: tuple = (), sums_spec: Any = REDUCED
) -> tuple[Any, Any]:
    """rows, sums = local(*split, *whole) on each device's own rows; sums are then added up over devices.

    Loops whose length depends on the data, and compaction, stay inside a shard: nothing is gathered across devices.

    Args:
        split: arrays (or trees of them) whose first axis is the batch, like those of the returned rows.
        whole: arrays (or trees of them) that every device holds whole.
        sums_spec: a prefix of the tree of sums; P(unreduced=...) leaves those parts to be added up later.
    """
    spec = jax.typeof(jax.tree.leaves(split)[0]).sharding.spec
    if not len(spec) or spec[0] is None:
        return local(*split, *whole)
    axis = spec[0]

    def add_up(spec, sums):
        return sums if spec.unreduced else jax.tree.map(lambda x: jax.lax.psum(x, axis), sums)

    def summed(*args):
        rows, sums = local(*args)
        return rows, jax.tree.map(add_up, sums_spec, sums, is_leaf=lambda x: isinstance(x, P))

    held = jax.tree.map(lambda x: P(reduced=jax.typeof(x).sharding.spec.reduced), whole)
    in_specs = (P(axis),) * len(split) + held
    mapped = jax.shard_map(summed, in_specs=in_specs, out_specs=(P(axis), sums_spec), check_vma=False)
    return mapped(*split, *whole)


def scaled(x: jax.Array, factor: jax.Array, dtype: Any) -> jax.Array:
    """(x * factor) as `dtype`; x may be unreduced over some axes, whose parts are then scaled one by one."""

    def scale(x, factor):
        return (x * factor).astype(dtype)

    spec = jax.typeof(x).sharding.spec
    if not spec.unreduced:
        return scale(x, factor)
    return jax.shard_map(scale, in_specs=(spec, P()), out_specs=spec, check_vma=False)(x, factor)
