"""Host batches on their devices."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from flaxdraft.config import RunConfig
from flaxdraft.devices.hosts import local_part
from flaxdraft.devices.mesh import BATCH_AXIS, FSDP_AXIS, SEQUENCE_AXIS
from flaxdraft.devices.sharding import Sharding, known
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Algorithm, Example

SHARDING = Sharding.parallel()


def check_batch(config: RunConfig) -> None:
    """
    Raises:
        InputError: the mesh or the micro-batches do not divide a batch; the message names the fields.
    """
    size, mesh = config.train.batch_size, config.mesh
    parts = {"train.accumulate": config.train.accumulate, "mesh.data": mesh.data, "mesh.fsdp": mesh.fsdp}
    if size % math.prod(parts.values()):
        over = " x ".join(f"{name}={number}" for name, number in parts.items() if number > 1)
        raise InputError(f"train.batch_size: {size} rows cannot be split over {over}; give a multiple of their product")


def placed(tree: Any, mesh: jax.sharding.Mesh, spec: jax.P) -> Any:
    """This process's rows of host arrays, on its devices."""
    place = jax.NamedSharding(mesh, spec)

    def put(x):
        x = np.asarray(x)
        _, count = local_part(jax.NamedSharding(mesh, jax.P(*spec[:1])), mesh.size)  # shares, of however many rows
        return jax.make_array_from_process_local_data(place, x, (len(x) * count, *x.shape[1:]))

    return jax.tree.map(put, tree)


def placed_rows(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """The same, split by batch rows alone, each of which is whole on its devices."""
    return placed(tree, mesh, known(SHARDING.act_b))


def own_rows(host: Example, mesh: jax.sharding.Mesh) -> Example:
    """Of a batch that every process holds whole: this process's rows."""
    index, count = local_part(jax.NamedSharding(mesh, known(SHARDING.act_b)), len(host.batch.tokens_BT))
    return jax.tree.map(lambda x: x[index * len(x) // count : (index + 1) * len(x) // count], host)


def rows_multiple(mesh: jax.sharding.Mesh) -> int:
    """The rows of every batch are a multiple of this."""
    return mesh.shape[BATCH_AXIS] * mesh.shape[FSDP_AXIS]


def shared_rows(host: Example, mesh: jax.sharding.Mesh, algorithm: Algorithm) -> tuple[Example, Any]:
    """A batch as its devices take it, and whether each array of it is split along rows: where the mesh has several
    devices along `sequence`, these share them."""
    if mesh.shape[SEQUENCE_AXIS] == 1:
        return host, jax.tree.map(lambda _: False, host)
    return algorithm.share(host, mesh.shape[SEQUENCE_AXIS])


def row_place(is_cut: bool) -> jax.P:
    """Where an array of a batch lives, see `shared_rows`."""
    return known(SHARDING.split_bt if is_cut else SHARDING.act_b)


def training_example(host: Example, mesh: jax.sharding.Mesh, algorithm: Algorithm, teacher: Any) -> Example:
    """One global batch, see `shared_rows`.

    Args:
        teacher: on its devices already.
    """
    host, cut = shared_rows(host, mesh, algorithm)
    rows = jax.tree.map(lambda x, is_cut: placed(x, mesh, row_place(is_cut)), host, cut)
    return dataclasses.replace(rows, teacher=teacher)
