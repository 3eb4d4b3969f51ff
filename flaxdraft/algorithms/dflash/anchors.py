"""Where blocks begin, chosen on the host.

Shape letters: B batch, T time, A anchors.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from flaxdraft.interfaces import AnyArray, Batch, Draw


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Anchors:
    """Rows of newest tokens, ascending; entries >= T are padding."""

    anchor_BA: Int[AnyArray, "B A"]


def possible(batch: Batch) -> Bool[np.ndarray, "B T"]:
    """The rows that can be anchors: the token and the one behind it are the assistant's, in one document."""
    segments, own = np.asarray(batch.segments_BT), np.asarray(batch.assistant_BT, bool)
    out = np.zeros(own.shape, bool)
    out[:, :-1] = own[:, :-1] & own[:, 1:] & (segments[:, :-1] == segments[:, 1:]) & (segments[:, :-1] > 0)
    return out


def every(batch: Batch, most: int) -> Anchors:
    """All possible anchors; no row has more than `most` of them."""
    length = batch.tokens_BT.shape[1]
    rows = np.sort(np.where(possible(batch), np.arange(length), length), axis=1)[:, :most]
    return Anchors(rows.astype(np.int32))


def lowest(uniform_BT: Float[np.ndarray, "B T-1"], possible_BT: Bool[np.ndarray, "B T"], most: int) -> Anchors:
    """In each row those of the possible anchors that drew the lowest numbers, ascending (SpecForge's rule).

    Args:
        uniform_BT: a number for each row but the last, which is no anchor.
        most: anchors of a row.
    """
    length = possible_BT.shape[1]
    drawn = np.where(possible_BT[:, :-1], uniform_BT, np.inf)
    kept = np.argsort(drawn, axis=1, kind="stable")[:, :most]
    kept = np.where(np.take_along_axis(possible_BT, kept, axis=1), kept, length)
    return Anchors(np.sort(kept, axis=1).astype(np.int32))


def drawn(batch: Batch, most: int, draw: Draw) -> Anchors:
    """At most `most` anchors of each batch row. What a row draws follows from its number in the global batch, so that
    hosts need not agree on anything."""
    num_batch, length = batch.tokens_BT.shape
    uniform = [np.random.default_rng((draw.seed, draw.step, draw.first_row + i)).random(length - 1)
               for i in range(num_batch)]  # fmt: skip
    return lowest(np.stack(uniform), possible(batch), most)
