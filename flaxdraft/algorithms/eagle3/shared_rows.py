"""One batch row shared by several devices (mesh axis `sequence`), laid out on the host.

The step-0 keys of all rows are made in equal runs of time, and then every device reads all of them. The supervised
rows, where almost all work is, are dealt out: the n rows of a batch row are cut into 2 S runs of equal length, and
device s gets runs s and 2 S - 1 - s, so that what one run sees of its past and what the other sees add up to the same
on every device. Each run is followed by the J - 1 rows after it, which bring the teachers of its last steps; they
belong to another device and train nothing here (`SharedRows.owned_BR`). Token ids, masks and positions are small and
whole everywhere, so that shifts read them across runs as they always do; taps and the target's last states are wide,
and each device gets those of its own rows alone.

Shape letters: B batch, T time, R rows, S devices of the axis, E target width.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from flaxdraft.algorithms.eagle3.objective import ChosenRows, SharedRows
from flaxdraft.interfaces import Example, Features


def dealt(num_rows: int, num_shards: int, num_steps: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each device the places (ascending) that it lists among `num_rows` supervised rows, and which it owns."""
    ends = np.round(np.linspace(0, num_rows, 2 * num_shards + 1)).astype(int)
    shares = []
    for shard in range(num_shards):
        listed, owned = np.zeros(num_rows, bool), np.zeros(num_rows, bool)
        for run in (shard, 2 * num_shards - 1 - shard):
            owned[ends[run] : ends[run + 1]] = True
            listed[ends[run] : ends[run + 1] + num_steps - 1 if ends[run] < ends[run + 1] else ends[run]] = True
        places = np.flatnonzero(listed)
        shares.append((places, owned[places]))
    return shares


def share(example: Example, num_shards: int, num_steps: int) -> tuple[Example, Example]:
    """A host's example with its rows dealt out, device after device along R, with what those rows read; and the same
    tree with True where an array is cut along its second axis.

    T is filled up to a multiple of S. The width of a device's part follows from R, S and J alone: one compile a shape.
    """
    batch, features, rows_BR = example.batch, example.features, example.chosen.rows_BR
    assert features is not None, "shared rows come with their features"
    assert features.last_BTE is not None, "the loss reads it"
    length, num_listed = batch.tokens_BT.shape[1], rows_BR.shape[1]
    missing = -length % num_shards
    fill = lambda x: np.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)])  # noqa: E731
    width = 2 * (-(-num_listed // (2 * num_shards)) + num_steps - 1)
    rows_BSR = np.full((len(rows_BR), num_shards, width), length + missing, np.int32)
    owned_BSR = np.zeros(rows_BSR.shape, bool)
    for row, (listed, owned) in zip(rows_BR, zip(rows_BSR, owned_BSR, strict=True), strict=True):
        supervised = row[row < length]
        for shard, (places, mine) in enumerate(dealt(len(supervised), num_shards, num_steps)):
            listed[shard, : len(places)] = supervised[places]
            owned[shard, : len(places)] = mine
    rows_BR, owned_BR = rows_BSR.reshape(len(rows_BSR), -1), owned_BSR.reshape(len(rows_BSR), -1)
    shared = SharedRows(_take(features.taps_BTKE, rows_BR), _take(features.last_BTE, rows_BR + 1), owned_BR)
    whole = Features(fill(features.taps_BTKE), None, fill(features.argmax_BT), fill(features.logsumexp_BT))
    out = Example(jax.tree.map(fill, batch), whole, ChosenRows(rows_BR, shared))
    cut = dataclasses.replace(
        jax.tree.map(lambda _: False, out), chosen=jax.tree.map(lambda _: True, out.chosen),
        features=dataclasses.replace(jax.tree.map(lambda _: False, whole), taps_BTKE=True),
    )  # fmt: skip
    return out, cut


def _take(x_BTE: np.ndarray, rows_BR: np.ndarray) -> np.ndarray:
    """Rows of each batch row; those past the end are 0."""
    length = x_BTE.shape[1]
    at_BR = np.minimum(rows_BR, length - 1)
    found = np.take_along_axis(x_BTE, at_BR.reshape(*at_BR.shape, *[1] * (x_BTE.ndim - 2)), axis=1)
    found[rows_BR >= length] = 0
    return found
