"""Documents packed into rows of one length, so that no product is spent on padding.

Documents are put together once, by first fit in an order that the seed gives; every epoch shuffles the packed rows. A
batch is then a function of (seed, step) alone and a seek reads nothing. Which documents share a row does not matter to
the mathematics: no query sees another document and nothing is supervised across an end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from flaxdraft.data.capture import supervised_token_counts
from flaxdraft.data.generation import Row, round_up
from flaxdraft.data.pipeline import HostBatch, check_supervision
from flaxdraft.data.store import StoredRow
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Algorithm, Batch, Features


class Documents(Protocol):
    """Random access to documents; a `FeatureStore` is one."""

    lengths: np.ndarray  # tokens of each
    supervised: np.ndarray  # tokens of each that the assistant produced
    token_counts: np.ndarray  # [V], how often the assistant produced each token

    def row(self, index: int) -> StoredRow: ...


class MemoryDocuments:
    """Answered prompts that are in memory."""

    def __init__(self, rows: Sequence[Row], vocab_size: int):
        self._rows = rows
        self.token_counts = supervised_token_counts(rows, vocab_size)
        self.lengths = np.array([len(row.tokens) for row in rows])
        self.supervised = np.array([row.num_answer for row in rows])

    def row(self, index: int) -> StoredRow:
        row = self._rows[index]
        return StoredRow(row.tokens, np.arange(len(row.tokens)) >= row.num_prompt, row.features)


def first_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Puts every item into the first bin that has room for it; returns the items of each bin. O(n log n).

    Every size is at most `capacity`.
    """
    leaves = 1 << max(len(sizes) - 1, 0).bit_length()
    room = [capacity] * (2 * leaves)  # of a heap-ordered tree: the most room below each node; leaves are bins
    bins: list[list[int]] = []
    for item, size in enumerate(sizes):
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= size else 2 * node + 1
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(item)
        room[node] -= size
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins


@dataclasses.dataclass(frozen=True)
class PackingFacts:
    """What packing did, for people."""

    rows: int
    documents: int
    tokens: int
    cut: int  # tokens behind the row length, left out
    length: int

    @property
    def fill(self) -> float:
        return self.tokens / (self.rows * self.length)


class PackedPipeline:
    """Random access to the packed batches of a run."""

    def __init__(
        self,
        documents: Documents,
        algorithm: Algorithm,
        *,
        length: int,
        batch_size: int,
        seed: int,
        part: tuple[int, int] = (0, 1),
    ):
        """
        Args:
            length: tokens of a packed row. A longer document is cut there.
            batch_size: packed rows of a global batch.
            part: (i, n): this host's share of every global batch, the i-th n-th of its rows.

        Raises:
            InputError: nothing is supervised, or not for long enough; the parts do not divide the batch.
        """
        if batch_size % part[1]:
            raise InputError(f"train.batch_size: {batch_size} rows cannot be split over {part[1]} hosts")
        kept = np.flatnonzero((documents.supervised >= 2) & (documents.lengths >= 2))
        sizes = np.minimum(documents.lengths[kept], length)
        check_supervision(documents.supervised[kept], algorithm)
        self._documents, self._algorithm = documents, algorithm
        self._length, self._batch_size, self._seed, self._part = length, batch_size, seed, part
        order = np.random.default_rng((seed, 0)).permutation(len(kept))
        packed = first_fit(sizes[order].tolist(), length)
        self._rows = [kept[order[members]] for members in packed]
        most = max(int(documents.supervised[members].sum()) for members in self._rows)
        self._supervised = min(round_up(most, 32), length)
        self._planned: tuple[int, np.ndarray] | None = None
        self.steps_per_epoch = -(-len(self._rows) // batch_size)
        self.facts = PackingFacts(
            len(self._rows), len(kept), int(sizes.sum()), int((documents.lengths[kept] - sizes).sum()), length
        )

    def batch(self, step: int) -> HostBatch:
        """This host's rows of the batch of one optimizer step; an epoch's last batch is filled up with empty rows."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._planned is None or self._planned[0] != epoch:
            rng = np.random.default_rng((self._seed, 1, epoch))
            self._planned = (epoch, rng.permutation(len(self._rows)))
        order, per_host = self._planned[1], self._batch_size // self._part[1]
        first = index * self._batch_size + self._part[0] * per_host
        members = [self._rows[i] for i in order[first : first + per_host]]
        return self._collate(members, per_host)

    def _collate(self, members: Sequence[np.ndarray], num_rows: int) -> HostBatch:
        shape = (num_rows, self._length)
        tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
        assistant = np.zeros(shape, bool)
        features: dict[str, np.ndarray] = {}
        sample = self._documents.row(int(self._rows[0][0])).features
        for field in dataclasses.fields(Features):
            like = getattr(sample, field.name)
            features[field.name] = np.zeros((*shape, *like.shape[1:]), like.dtype)
        for at, documents in enumerate(members):
            start = 0
            for number, index in enumerate(documents, 1):
                row = self._documents.row(int(index))
                num = min(len(row.tokens), self._length)
                span = (at, slice(start, start + num))
                tokens[span], assistant[span] = row.tokens[:num], row.assistant[:num]
                segments[span], positions[span] = number, np.arange(num)
                for name, array in features.items():
                    array[span] = getattr(row.features, name)[:num]
                start += num
        kept = self._algorithm.rows(assistant, segments)
        rows_BR = np.full((num_rows, self._supervised), self._length, np.int32)
        rows_BR[:, : kept.shape[1]] = kept
        return HostBatch(Batch(tokens, assistant, segments, positions), Features(**features), rows_BR)
