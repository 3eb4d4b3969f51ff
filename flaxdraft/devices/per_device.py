"""What each device does with its own part of the arrays."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import P

from flaxdraft.devices.sharding import Sharding, axes_of, dual, spec_of


def on_shards(sharding: Sharding, local: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`local` on each device's own part of the arrays, or as it is where nothing is sharded."""
    if sharding.cache_lbn is None:
        return local
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def added_up(gradient: jax.Array, x_spec: P, axes: frozenset[str]) -> jax.Array:
    """Inside a device: its part of the gradient of x, where results that x went into are split over `axes`. Summed over
    those axes along which x is whole, but for the ones over which its gradient stays unreduced."""
    missing = tuple(sorted(axes - axes_of(x_spec.partitions) - x_spec.reduced))
    return jax.lax.psum(gradient, missing) if missing else gradient


def per_device(local: Callable, out_specs: Any, *args: Any) -> Any:
    """local(*args) on each device's own part of the arguments, which are taken as they lie; out_specs say where the
    results do. Differentiable; `local` may hold collectives that transpose to themselves.

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

    duals = jax.tree.map(dual, out_specs, is_leaf=lambda x: isinstance(x, P))
    out = [dual(spec) for spec, m in zip(specs, moving, strict=True) if m]
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
