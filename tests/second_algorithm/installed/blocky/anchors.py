"""Where blocks begin, chosen on the host.

Row p stands for the block whose newest token is x_{p+1}: the target has read x_0..x_p, and the block proposes x_{p+2}
and on. Shape letters: B batch, T time, A anchors.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jaxtyping import Array, Int

from flaxdraft.interfaces import Batch, Draw


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Anchors:
    """Rows, ascending; entries >= T are padding."""

    rows_BA: Int[Array, "B A"]


def possible(batch: Batch) -> np.ndarray:
    """bool [B, T]: the rows whose next two tokens are the assistant's, in one document: one to begin with and one to
    propose."""
    segments, own = np.asarray(batch.segments_BT), np.asarray(batch.assistant_BT, bool)
    out = np.zeros(own.shape, bool)
    same = (segments[:, :-2] == segments[:, 1:-1]) & (segments[:, 1:-1] == segments[:, 2:]) & (segments[:, :-2] > 0)
    out[:, :-2] = own[:, 1:-1] & own[:, 2:] & same
    return out


def every(batch: Batch, most: int) -> Anchors:
    """All of them; no row has more than `most`."""
    length = batch.tokens_BT.shape[1]
    rows = np.sort(np.where(possible(batch), np.arange(length), length), axis=1)[:, :most]
    return Anchors(rows.astype(np.int32))


def drawn(batch: Batch, num: int, draw: Draw) -> Anchors:
    """`num` of each batch row, by the row's number in the global batch: hosts need not agree on anything."""
    found, length = possible(batch), batch.tokens_BT.shape[1]
    rows = np.full((len(found), num), length, np.int32)
    for i, row_T in enumerate(found):
        some = np.flatnonzero(row_T)
        generator = np.random.default_rng((draw.seed, draw.step, draw.first_row + i))
        some = np.sort(generator.choice(some, min(num, len(some)), replace=False))
        rows[i, : len(some)] = some
    return Anchors(rows)
