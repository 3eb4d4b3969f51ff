"""Which places a step computes, chosen on the host: the COD sampling of arXiv 2602.01469.

An element (anchor s, depth d) stands at place p = s + d of its row. Depth 0 is computed at every row of the text, since
all later depths attend to it; depth d > 0 has elements behind some anchors. Whoever has depth d has all depths before
it, so that an anchor with its depths is a chain.

Shape letters: B batch, T rows, R elements of a depth, D depths, C depths but the first.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from flaxdraft.algorithms.eagle3.objective import supervision
from flaxdraft.algorithms.peagle.settings import Settings
from flaxdraft.interfaces import AnyArray, Batch, Draw


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Depths:
    """The elements of each depth, by their anchors; of depth 0 those whose outputs are asked for."""

    anchors: tuple[Int[AnyArray, "B R"], ...]  # ascending; entries >= T are padding
    # Of each depth but the first: the index of each anchor among those of the depth before. Where it is not among them
    # (padding, and anchors at which depth 0 is not asked for), the number of these.
    parents: tuple[Int[AnyArray, "B R"], ...]


def trainable(batch: Batch) -> Bool[np.ndarray, "B T"]:
    """The places whose next two tokens are the assistant's, in their document: one is read there (or masked), the other
    is predicted."""
    return _supervision(batch, 1)[0]


def _supervision(batch: Batch, num_depths: int) -> Bool[np.ndarray, "D B T"]:
    return np.asarray(supervision(np.asarray(batch.assistant_BT), np.asarray(batch.segments_BT), num_depths))


def share(settings: Settings, depth: int) -> float:
    """The part of the places that can be trained at which a depth is trained."""
    return max(settings.down_sample_ratio**depth, settings.down_sample_ratio_min)


def chains(
    trainable_T: Bool[np.ndarray, " T"],
    segments_T: Int[np.ndarray, " T"],
    uniform_CT: Float[np.ndarray, "C T"],
    settings: Settings,
) -> list[np.ndarray]:
    """The anchors of each depth but the first, in one row.

    At each depth the places that drew the lowest numbers are kept. Depth 1 draws among all places that can be trained,
    each later one among those behind the places that the depth before kept (SpecForge's rule).
    """
    count, candidates, found = int(trainable_T.sum()), np.flatnonzero(trainable_T), []
    for depth, uniform_T in enumerate(uniform_CT, 1):
        candidates = candidates[candidates >= depth]
        candidates = candidates[segments_T[candidates - depth] == segments_T[candidates]]
        size = max(int((count - depth) * share(settings, depth)), 0)
        kept = np.sort(candidates[np.argsort(uniform_T[candidates], kind="stable")[:size]])
        found.append(kept - depth)
        behind = kept[kept < len(trainable_T) - 1] + 1
        candidates = behind[trainable_T[behind]]
    return found


def sampled(batch: Batch, most: int, draw: Draw, settings: Settings) -> Depths:
    """Depths of each batch row, by the row's number in the global batch: hosts need not agree on anything.

    Args:
        most: supervised tokens of a row.
    """
    (num_batch, length), later = batch.tokens_BT.shape, range(1, settings.num_depths)
    can_BT, segments_BT = trainable(batch), np.asarray(batch.segments_BT)
    rows = []
    for i in range(num_batch):
        rng = np.random.default_rng([draw.seed, draw.step, draw.first_row + i])
        uniform_CT = rng.random((settings.num_depths - 1, length))
        rows.append([np.flatnonzero(can_BT[i]), *chains(can_BT[i], segments_BT[i], uniform_CT, settings)])
    return joined(rows, [most, *(int((most - depth) * share(settings, depth)) for depth in later)], length)


def every(batch: Batch, most: int, num_depths: int) -> Depths:
    """All places, with as many depths as can be trained behind each; nothing is drawn."""
    asked_DBT = _supervision(batch, num_depths)
    rows = [[np.flatnonzero(asked_T) for asked_T in asked_DT] for asked_DT in np.moveaxis(asked_DBT, 1, 0)]
    return joined(rows, [most] * num_depths, batch.tokens_BT.shape[1])


def joined(rows: list[list[np.ndarray]], widths: list[int], length: int) -> Depths:
    """The elements of all batch rows in arrays, padded.

    Args:
        rows: of each batch row, the anchors by depth.
        widths: the most elements of each depth.
    """
    widths = [max(width, 1) for width in widths]
    anchors = [np.full((len(rows), width), length, np.int32) for width in widths]
    parents = [np.full((len(rows), width), before, np.int32) for before, width in itertools.pairwise(widths)]
    for i, found in enumerate(rows):
        for depth, own in enumerate(found):
            anchors[depth][i, : len(own)] = own
            if depth:
                before = found[depth - 1]
                at = np.searchsorted(before, own)
                there = np.isin(own, before)
                parents[depth - 1][i, : len(own)] = np.where(there, at, widths[depth - 1])
    return Depths(tuple(anchors), tuple(parents))
