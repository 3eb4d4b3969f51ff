"""Host batches on their devices."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from flaxdraft.algorithms.eagle3.shared_rows import split_rows
from flaxdraft.config import RunConfig
from flaxdraft.data.pipeline import HostBatch
from flaxdraft.devices.hosts import local_part
from flaxdraft.devices.mesh import BATCH_AXIS, FSDP_AXIS, SEQUENCE_AXIS, Sharding
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Example, Features

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
    return placed(tree, mesh, SHARDING.act_b)


def own_rows(host: HostBatch, mesh: jax.sharding.Mesh) -> HostBatch:
    """Of a batch that every process holds whole: this process's rows."""
    index, count = local_part(jax.NamedSharding(mesh, SHARDING.act_b), len(host.rows_BR))
    return jax.tree.map(lambda x: x[index * len(x) // count : (index + 1) * len(x) // count], host)


def rows_multiple(mesh: jax.sharding.Mesh) -> int:
    """The rows of every batch are a multiple of this."""
    return mesh.shape[BATCH_AXIS] * mesh.shape[FSDP_AXIS]


def evaluation_batch(host: HostBatch, mesh: jax.sharding.Mesh) -> tuple:
    """Batch, features and rows."""
    return placed_rows((host.batch, host.features, host.rows_BR), mesh)


def training_example(host: HostBatch, mesh: jax.sharding.Mesh, num_steps: int, teacher_head_WE: jax.Array) -> Example:
    """One global batch, its rows shared along `sequence` where the mesh has several devices there.

    Args:
        num_steps: unroll steps of the algorithm.
    """
    if mesh.shape[SEQUENCE_AXIS] == 1:
        return Example(*evaluation_batch(host, mesh), teacher_head_WE)
    host, split = split_rows(host, mesh.shape[SEQUENCE_AXIS], num_steps)
    features = host.features
    whole = placed((host.batch, features.argmax_BT, features.logsumexp_BT), mesh, SHARDING.act_b)
    shared = placed((features.taps_BT3E, host.rows_BR, split), mesh, SHARDING.split_bt)
    (batch, argmax, logsumexp), (taps, rows_BR, split) = whole, shared
    return Example(batch, Features(taps, None, argmax, logsumexp), rows_BR, teacher_head_WE, split=split)
