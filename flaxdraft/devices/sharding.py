"""Where each array lives on the mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
from jax import P

from flaxdraft.devices.mesh import BATCH_AXIS, EXPERT_AXIS, FSDP_AXIS, SEQUENCE_AXIS, TENSOR_AXIS


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
    weight_xf: P | None = None
    weight_xd: P | None = None
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
            weight_xf=P(EXPERT_AXIS, TENSOR_AXIS), weight_xd=P(EXPERT_AXIS, None),
            weight_xdf=P(EXPERT_AXIS, FSDP_AXIS, TENSOR_AXIS), weight_xfd=P(EXPERT_AXIS, TENSOR_AXIS, FSDP_AXIS),
            whole=P(), cache_lbn=P(None, batch, TENSOR_AXIS),
        )  # fmt: skip


def spec_of(x: jax.Array) -> P:
    """Where an array lives, by its type: one entry a dimension, and the axes over which it is reduced or unreduced."""
    return jax.typeof(x).sharding.spec


def known(spec: P | None) -> P:
    """An entry of a `Sharding` over a mesh, which leaves no choice to JAX."""
    assert spec is not None, "a sharding without a mesh"
    return spec


def partitions_of(spec: P) -> tuple[Any, ...]:
    """One entry a dimension: None, or the mesh axis or axes that split it. JAX types them as a tuple of one."""
    return spec.partitions


def axes_of(partitions: Iterable) -> frozenset[str]:
    """The mesh axes among some entries of a spec."""
    flat = [(entry,) if isinstance(entry, str) else entry or () for entry in partitions]
    return frozenset(axis for entry in flat for axis in entry)


def along(x: jax.Array, spec: P | None) -> P | None:
    """`spec` of something [batch, time, ...], with batch and time split as they are in x."""
    return spec and P(*spec_of(x).partitions[:2], *spec.partitions[2:])


def used(spec: P | None) -> P | None:
    """Where a weight that lives at `spec` is while a product uses it: whole along fsdp."""
    return spec and P(*(None if axis == FSDP_AXIS else axis for axis in spec))


def gathered(weight: jax.Array, spec: P | None) -> jax.Array:
    """A weight as a product wants it: whole along fsdp, for as long as it is used."""
    if spec is None or FSDP_AXIS not in axes_of(spec_of(weight).partitions):
        return weight
    return jax.reshard(weight, used(spec_of(weight)))


def whole_in_time(x: jax.Array) -> jax.Array:
    """[B, T, ...] put together along time on every device. Its gradient stays unreduced: however often x is used, the
    parts are added up and scattered once."""
    batch, time, *rest = partitions_of(spec_of(x))
    return x if time is None else jax.reshard(x, P(batch, None, *rest, reduced=frozenset({time})))


def into_columns(x: jax.Array, spec: P | None) -> jax.Array:
    """x [B, T, D] on its way into several products whose outputs are split as `spec`'s last axis says: what they give
    back to x is added up on each device and reduced once, not once a product."""
    axis = spec and partitions_of(spec)[-1]
    return jax.reshard(x, P(*spec_of(x).partitions, reduced=frozenset({axis}))) if axis else x


def everywhere(x: jax.Array) -> jax.Array:
    """Inside a program: whole on every device of the mesh, where there is one."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.reshard(x, P())


def split_like(like: jax.Array, x: jax.Array) -> jax.Array:
    """x [B, T, ...], which every device holds whole along time, cut along time as `like` is."""
    batch, time, *_ = partitions_of(spec_of(like))
    return x if time is None else jax.reshard(x, P(batch, time, *spec_of(x).partitions[2:]))


def gradient_spec(x: jax.Array) -> P:
    """Where the gradient of an array lives: as the array, and unreduced over the axes that its type calls reduced, so
    that whoever accumulates gradients adds them up over devices once."""
    return dual(spec_of(x))


def dual(spec: P) -> P:
    """Where the gradient of something lives that lives at `spec`."""
    return P(*spec.partitions, unreduced=spec.reduced)
