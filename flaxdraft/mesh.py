"""The device mesh and where each array lives on it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import P

from flaxdraft.errors import InputError

BATCH_AXIS, FSDP_AXIS, TENSOR_AXIS, EXPERT_AXIS = "data", "fsdp", "tensor", "expert"
AXES = (BATCH_AXIS, FSDP_AXIS, TENSOR_AXIS, EXPERT_AXIS)
REDUCED = P()


@dataclasses.dataclass(frozen=True)
class Sharding:
    """Where each logical array lives; the field suffix names its dims: b batch, t time, d width, f what a projection
    widens to (heads, feed-forward), n heads, h head width, v vocabulary, x experts, l layers. `None` leaves the choice
    to JAX."""

    act_b: P | None = None
    act_btd: P | None = None
    act_btf: P | None = None
    act_btnh: P | None = None
    weight_ve: P | None = None
    weight_df: P | None = None
    weight_fd: P | None = None
    weight_dd: P | None = None
    weight_f: P | None = None
    weight_xdf: P | None = None
    weight_xfd: P | None = None
    whole: P | None = None
    cache_lbn: P | None = None  # and two more axes, slots and width

    @classmethod
    def none(cls) -> Sharding:
        """One device, no mesh."""
        return cls()

    @classmethod
    def data_parallel(cls, axis: str = BATCH_AXIS) -> Sharding:
        """Weights replicated, rows of the batch split over one axis."""
        return cls(act_b=P(axis), act_btd=P(axis, None, None))

    @classmethod
    def parallel(cls) -> Sharding:
        """Over all four axes: the batch over data and fsdp; weights over fsdp, gathered where they are used, and over
        tensor; experts over expert."""
        batch = (BATCH_AXIS, FSDP_AXIS)
        return cls(
            act_b=P(batch), act_btd=P(batch, None, None), act_btf=P(batch, None, TENSOR_AXIS),
            act_btnh=P(batch, None, TENSOR_AXIS, None), weight_ve=P(TENSOR_AXIS, FSDP_AXIS),
            weight_df=P(FSDP_AXIS, TENSOR_AXIS), weight_fd=P(TENSOR_AXIS, FSDP_AXIS), weight_dd=P(FSDP_AXIS, None),
            weight_f=P(TENSOR_AXIS), weight_xdf=P(EXPERT_AXIS, FSDP_AXIS, TENSOR_AXIS),
            weight_xfd=P(EXPERT_AXIS, TENSOR_AXIS, FSDP_AXIS), whole=P(), cache_lbn=P(None, batch, TENSOR_AXIS),
        )  # fmt: skip


def make_mesh(data: int, fsdp: int = 1, tensor: int = 1, expert: int = 1) -> jax.sharding.Mesh:
    """A mesh of explicit axes over the first data x fsdp x tensor x expert devices.

    Raises:
        InputError: fewer devices are visible.
    """
    shape = (data, fsdp, tensor, expert)
    wanted = math.prod(shape)
    if wanted > jax.device_count():
        sizes = ", ".join(f"mesh.{name}: {size}" for name, size in zip(AXES, shape, strict=True) if size > 1)
        raise InputError(f"{sizes} devices were asked for, {jax.device_count()} are visible ({jax.default_backend()})")
    return jax.make_mesh(shape, AXES, devices=jax.devices()[:wanted])


def gathered(weight: jax.Array, spec: P | None) -> jax.Array:
    """A weight as a product wants it: whole along fsdp, for as long as it is used."""
    if spec is None or FSDP_AXIS not in spec:
        return weight
    return jax.reshard(weight, P(*(None if axis == FSDP_AXIS else axis for axis in spec)))


def on_shards(sharding: Sharding, local: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`local` on each device's own part of the arrays, or as it is where nothing is sharded."""
    if sharding.cache_lbn is None:
        return local
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)


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
