"""Where the weights of targets and drafts live, found by the end of their JAX paths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import P

from flaxdraft.devices.mesh import Sharding, check_divides

# Path pattern -> field of `Sharding`.
_PLACES = (
    (r"(^|/)(embed|head|embed_tokens)$", "weight_ve"),
    (r"(q_proj|k_proj|v_proj|q_b_proj|kv_b_proj|gate_proj|up_proj|fc|lm_head)/kernel$", "weight_df"),
    (r"(q_proj|k_proj|v_proj|gate_proj|up_proj)/bias$", "weight_f"),
    (r"(o_proj|down_proj)/kernel$", "weight_fd"),
    (r"(q_a_proj|kv_a_proj_with_mqa)/kernel$", "weight_dd"),
    (r"experts/(gate_proj|up_proj)$", "weight_xdf"),
    (r"experts/down_proj$", "weight_xfd"),
    (r"(scale|(o_proj|down_proj|q_a_proj|kv_a_proj_with_mqa)/bias|gate/kernel|gate/bias)$", "whole"),
    (r"(target_ids|draft_ids)$", "whole"),
)


def place_of(path: tuple, sharding: Sharding) -> P:
    """Of the weight at that path of an NNX state."""
    name = "/".join(map(str, path))
    return getattr(sharding, next(field for pattern, field in _PLACES if re.search(pattern, name)))


def check_heads(config: Any, sharding: Sharding, mesh_shape: Mapping[str, int]) -> None:
    """
    Raises:
        InputError: the heads cannot be split over the mesh.
    """
    for name in ("num_attention_heads", "num_key_value_heads"):
        if hasattr(config, name):
            check_divides(name, (getattr(config, name),), sharding.weight_f, mesh_shape)


def weight_on_mesh(name: str, weight: jax.Array, mesh: jax.sharding.Mesh, spec: P) -> jax.Array:
    """A weight in its place; every process of the mesh brings the same one.

    Raises:
        InputError: the mesh does not divide it; the message names it and the axis.
    """
    host = np.asarray(weight)
    check_divides(name, host.shape, spec, mesh.shape)
    return jax.make_array_from_callback(host.shape, jax.NamedSharding(mesh, spec), host.__getitem__)


def on_mesh(state: nnx.State, mesh: jax.sharding.Mesh, sharding: Sharding) -> nnx.State:
    """An unstacked state, each weight in its place; see `weight_on_mesh`."""

    def place(path, variable):
        name, spec = "/".join(map(str, path)), place_of(path, sharding)
        return variable.replace(weight_on_mesh(name, variable[...], mesh, spec))

    return nnx.from_flat_state([(path, place(path, variable)) for path, variable in nnx.to_flat_state(state)])
