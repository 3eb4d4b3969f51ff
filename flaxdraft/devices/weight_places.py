"""The weights of targets and drafts, each in the place that the module which made it chose.

The choice travels as metadata of the variable, through nnx.split, merge, eval_shape and vmap. It is a name, and not a
place itself, so that a state has the same structure whatever mesh it is made for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import P

from flaxdraft.devices.mesh import check_divides
from flaxdraft.devices.sharding import Sharding, known


def place_of(variable: nnx.Variable, sharding: Sharding) -> P:
    """Where a variable of an NNX state lives: who made it named a field of `sharding` (`nnx.Param(value, place=...)`),
    or nothing, and then every device holds all of it. The field speaks of one layer's axes; an axis before them is of
    stacked layers, and every device holds its part of each."""
    spec = getattr(sharding, variable.get_metadata().get("place", "whole"))
    stacked = len(variable.shape) - len(spec)
    return P(*[None] * stacked, *spec) if len(spec) else spec


def check_heads(config: Any, sharding: Sharding, mesh_shape: Mapping[str, int]) -> None:
    """
    Raises:
        InputError: the heads cannot be split over the mesh.
    """
    for name in ("num_attention_heads", "num_key_value_heads"):
        if hasattr(config, name):
            check_divides(name, (getattr(config, name),), known(sharding.weight_f), mesh_shape)


def weight_on_mesh(name: str, weight: jax.Array, mesh: jax.sharding.Mesh, spec: P) -> jax.Array:
    """A weight in its place; every process of the mesh brings the same one.

    Raises:
        InputError: the mesh does not divide it; the message names it and the axis.
    """
    host = np.asarray(weight)
    check_divides(name, host.shape, spec, mesh.shape)
    return jax.make_array_from_callback(host.shape, jax.NamedSharding(mesh, spec), host.__getitem__)


def on_every_device(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Arrays, each whole on every device of the mesh; every process of it brings the same ones."""
    return jax.tree.map(lambda x: weight_on_mesh("", x, mesh, P()), tree)


def on_mesh(state: nnx.State, mesh: jax.sharding.Mesh, sharding: Sharding) -> nnx.State:
    """A state, each weight in its place; see `weight_on_mesh`."""

    def place(path, variable):
        name, spec = "/".join(map(str, path)), place_of(variable, sharding)
        return variable.replace(weight_on_mesh(name, variable[...], mesh, spec))

    return nnx.from_flat_state([(path, place(path, variable)) for path, variable in nnx.to_flat_state(state)])
