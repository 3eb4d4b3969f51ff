"""The device mesh and where each array lives on it.

Axes: data, fsdp (both split the batch; fsdp also keeps weights in pieces), sequence (splits the rows of a batch row),
tensor (heads, feed-forward, vocabulary), expert (of targets). Neighbours along the last axes are neighbouring devices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import P

from flaxdraft.errors import InputError

BATCH_AXIS, FSDP_AXIS, SEQUENCE_AXIS, EXPERT_AXIS, TENSOR_AXIS = AXES = "data", "fsdp", "sequence", "expert", "tensor"


@dataclasses.dataclass(frozen=True)
class Sharding:
    """Where each logical array lives; the field suffix names its dims: b batch, t time, d width, f what a projection
    widens to (heads, feed-forward, draft vocabulary), n heads, h head width, v vocabulary, x experts, l layers. `None`
    leaves the choice to JAX.

    Activations take batch and time from the arrays that they are made of (`along`), so that the same model runs on rows
    that are whole and on rows that are split (`split_bt`)."""

    act_b: P | None = None
    split_bt: P | None = None
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
    def parallel(cls) -> Sharding:
        """Over all axes: the batch over data and fsdp, its rows over sequence; weights over fsdp, gathered where they
        are used, and over tensor; experts over expert."""
        batch = (BATCH_AXIS, FSDP_AXIS)
        return cls(
            act_b=P(batch), split_bt=P(batch, SEQUENCE_AXIS), act_btd=P(batch, None, None),
            act_btf=P(batch, None, TENSOR_AXIS), act_btnh=P(batch, None, TENSOR_AXIS, None),
            weight_ve=P(TENSOR_AXIS, FSDP_AXIS), weight_df=P(FSDP_AXIS, TENSOR_AXIS),
            weight_fd=P(TENSOR_AXIS, FSDP_AXIS), weight_dd=P(FSDP_AXIS, None), weight_f=P(TENSOR_AXIS),
            weight_xdf=P(EXPERT_AXIS, FSDP_AXIS, TENSOR_AXIS), weight_xfd=P(EXPERT_AXIS, TENSOR_AXIS, FSDP_AXIS),
            whole=P(), cache_lbn=P(None, batch, TENSOR_AXIS),
        )  # fmt: skip


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, expert: int = 1, sequence: int = 1) -> jax.sharding.Mesh:
    """A mesh of explicit axes over the first data x fsdp x tensor x expert x sequence devices.

    Raises:
        InputError: fewer devices are visible.
    """
    shape = (data, fsdp, sequence, expert, tensor)
    wanted = math.prod(shape)
    if wanted > jax.device_count():
        sizes = ", ".join(f"mesh.{name}: {size}" for name, size in zip(AXES, shape, strict=True) if size > 1)
        raise InputError(f"{sizes} devices were asked for, {jax.device_count()} are visible ({jax.default_backend()})")
    return jax.make_mesh(shape, AXES, devices=jax.devices()[:wanted])


def check_divides(name: str, shape: Iterable[int], spec: P, mesh_shape: Any) -> None:
    """
    Raises:
        InputError: an axis of the mesh does not divide its dimension of the named array.
    """
    for size, axis in zip(shape, spec, strict=False):
        if axis is not None and size % mesh_shape[axis]:
            raise InputError(
                f"mesh.{axis}: {mesh_shape[axis]} devices do not divide {name} {tuple(shape)}; expected a divisor of "
                f"{size}"
            )


def spec_of(x: jax.Array) -> P:
    """Where an array lives, by its type: one entry a dimension, and the axes over which it is reduced or unreduced."""
    return jax.typeof(x).sharding.spec


def axes_of(partitions: Iterable) -> frozenset[str]:
    """The mesh axes among some entries of a spec."""
    flat = [(entry,) if isinstance(entry, str) else entry or () for entry in partitions]
    return frozenset(axis for entry in flat for axis in entry)


def along(x: jax.Array, spec: P | None) -> P | None:
    """`spec` of something [batch, time, ...], with batch and time split as they are in x."""
    return spec and P(*spec_of(x).partitions[:2], *spec.partitions[2:])


def gathered(weight: jax.Array, spec: P | None) -> jax.Array:
    """A weight as a product wants it: whole along fsdp, for as long as it is used."""
    if spec is None or FSDP_AXIS not in axes_of(spec_of(weight).partitions):
        return weight
    return jax.reshard(weight, P(*(None if axis == FSDP_AXIS else axis for axis in spec_of(weight))))


def whole_in_time(x: jax.Array) -> jax.Array:
    """[B, T, ...] put together along time on every device. Its gradient stays unreduced: however often x is used, the
    parts are added up and scattered once."""
    batch, time, *rest = spec_of(x).partitions
    return x if time is None else jax.reshard(x, P(batch, None, *rest, reduced={time}))


def into_columns(x: jax.Array, spec: P | None) -> jax.Array:
    """x [B, T, D] on its way into several products whose outputs are split as `spec`'s last axis says: what they give
    back to x is added up on each device and reduced once, not once a product."""
    axis = spec and spec.partitions[-1]
    return jax.reshard(x, P(*spec_of(x).partitions, reduced={axis})) if axis else x


def split_like(like: jax.Array, x: jax.Array) -> jax.Array:
    """x [B, T, ...], which every device holds whole along time, cut along time as `like` is."""
    batch, time, *_ = spec_of(like).partitions
    return x if time is None else jax.reshard(x, P(batch, time, *spec_of(x).partitions[2:]))


def on_shards(sharding: Sharding, local: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`local` on each device's own part of the arrays, or as it is where nothing is sharded."""
    if sharding.cache_lbn is None:
        return local
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def gradient_spec(x: jax.Array) -> P:
    """Where the gradient of an array lives: as the array, and unreduced over the axes that its type calls reduced, so
    that whoever accumulates gradients adds them up over devices once."""
    return _dual(spec_of(x))


def _dual(spec: P) -> P:
    return P(*spec.partitions, unreduced=spec.reduced)


def added_up(gradient: jax.Array, x_spec: P, axes: frozenset[str]) -> jax.Array:
    """Inside a device: its part of the gradient of x, where results that x went into are split over `axes`. Summed over
    those axes along which x is whole, but for the ones over which its gradient stays unreduced."""
    missing = tuple(sorted(axes - axes_of(x_spec.partitions) - x_spec.reduced))
    return jax.lax.psum(gradient, missing) if missing else gradient


def per_device(local: Callable, out_specs: Any, *args: Any) -> Any:
    """local(*args) on each device's own part of the arguments, which are taken as they lie; out_specs say where the
    results do. Differentiable, with `gradient_spec`; `local` may hold collectives that transpose to themselves.

    Loops whose length depends on the data, gathers by index and compaction stay inside a device.
    """
    if not any(axes_of(spec_of(x).partitions) for x in jax.tree.leaves(args)):
        return local(*args)
    return _mapped(local, out_specs, *args)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mapped(local, out_specs, *args):
    in_specs = jax.tree.map(spec_of, args)
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)


def _mapped_forward(local, out_specs, *args):
    return _mapped(local, out_specs, *args), args


def _mapped_backward(local, out_specs, args, cotangents):
    leaves, tree = jax.tree.flatten(args)
    specs, moving = [spec_of(x) for x in leaves], [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]
    out_leaves = jax.tree.leaves(out_specs, is_leaf=lambda x: isinstance(x, P))
    axes = frozenset().union(*(axes_of(spec.partitions) for spec in out_leaves))

    def pull(leaves, cotangents):
        def of_moving(some):
            some = iter(some)
            return local(*jax.tree.unflatten(tree, [next(some) if m else x for x, m in zip(leaves, moving)]))  # noqa: B905

        _, back = jax.vjp(of_moving, [x for x, m in zip(leaves, moving, strict=True) if m])
        (gradients,) = back(cotangents)
        kept = [spec for spec, m in zip(specs, moving, strict=True) if m]
        return [added_up(g, spec, axes) for g, spec in zip(gradients, kept, strict=True)]

    duals = jax.tree.map(_dual, out_specs, is_leaf=lambda x: isinstance(x, P))
    out = [_dual(spec) for spec, m in zip(specs, moving, strict=True) if m]
    mapped = jax.shard_map(pull, in_specs=(specs, duals), out_specs=out, check_vma=False)
    gradients = iter(mapped(leaves, cotangents))
    return tuple(jax.tree.unflatten(tree, [next(gradients) if m else None for m in moving]))


_mapped.defvjp(_mapped_forward, _mapped_backward)


def scaled(x: jax.Array, factor: jax.Array, dtype: Any) -> jax.Array:
    """(x * factor) as `dtype`; x may be unreduced over some axes, whose parts are then scaled one by one."""

    def scale(x, factor):
        return (x * factor).astype(dtype)

    spec = spec_of(x)
    if not spec.unreduced:
        return scale(x, factor)
    return jax.shard_map(scale, in_specs=(spec, P()), out_specs=spec, check_vma=False)(x, factor)
