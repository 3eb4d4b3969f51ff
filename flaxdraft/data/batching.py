"""Which documents a batch is made of, for every step of a run, without reading one.

`Buckets`: one document a row, rows of similar length in a batch. `Packed`: documents put together into rows of one
length, so that no product is spent on padding. Either way every epoch holds each row once, in an order of its own that
Grain's index shuffle gives: the rows of a step are computed from (seed, step) in constant time, so a seek costs nothing
and the one number that says how far a run has come is its step.

Rows that do not fill the last batch of an epoch (of each length) are handled as `last_batch` says: "fill" adds empty
rows, which supervise nothing, so that no document is missed; "drop" leaves those rows out of that epoch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import grain
import numpy as np

from flaxdraft.errors import InputError
from flaxdraft.ops.padding import round_up

LastBatch = Literal["fill", "drop"]


class BatchRows(NamedTuple):
    """The rows of one global batch; there are fewer than the batch holds where a partial one is to be filled up."""

    documents: list[np.ndarray]  # of each row, in their order
    length: int  # tokens of a row
    most_supervised: int  # a bound on the supervised ones of a row


class Layout(Protocol):
    steps_per_epoch: int
    kept: np.ndarray  # the documents that are trained on

    def rows(self, step: int) -> BatchRows: ...

    def describe(self) -> str: ...


class Sizes(NamedTuple):
    """Of every document, in tokens."""

    lengths: np.ndarray
    supervised: np.ndarray

    def usable(self) -> np.ndarray:
        """Documents that can supervise something: a row predicts the second of two supervised tokens."""
        return np.flatnonzero((self.supervised >= 2) & (self.lengths >= 2))


class Shuffled(Protocol):
    """Grain's, which types an element as anything or None; here it is always an int."""

    def __getitem__(self, index: int, /) -> Any: ...


def shuffled(num: int, *seed: int) -> Shuffled:
    """x[e * num + i]: element i of epoch e of a shuffled range(num); each epoch in its own order."""
    return grain.MapDataset.range(num).shuffle(seed=int(np.random.SeedSequence(seed).generate_state(1)[0]))


def _batches_of(num_rows: int, batch_size: int, last_batch: LastBatch) -> int:
    return num_rows // batch_size if last_batch == "drop" else -(-num_rows // batch_size)


def _check_steps(steps: int, num_rows: int, batch_size: int) -> None:
    if steps == 0:
        raise InputError(
            f"data.last_batch: drop leaves nothing of {num_rows} rows, which fill no batch of {batch_size} "
            "(train.batch_size) of one length; take fill, or a smaller batch"
        )


def _say_partial(count: int, last_batch: LastBatch) -> str:
    if not count:
        return ""
    what = "join partial batches, filled up with empty rows" if last_batch == "fill" else "are left out of each epoch"
    return f"; {count} rows {what} (data.last_batch={last_batch})"


def _edges(lengths: np.ndarray, num_buckets: int, at_least: int) -> list[int]:
    """The padded length of each bucket, by quantiles; one that holds too few documents joins its neighbour, so that
    there are none that no epoch ever takes."""
    quantiles = [int(np.quantile(lengths, (i + 1) / num_buckets, method="higher")) for i in range(num_buckets)]
    edges = sorted({round_up(edge, 32) for edge in quantiles})
    while len(edges) > 1:
        counts = np.bincount(np.searchsorted(edges, lengths), minlength=len(edges))
        few = int(np.argmin(counts))
        if counts[few] >= at_least:
            break
        del edges[min(few, len(edges) - 2)]  # the longest length stays
    return edges


class _Bucket(NamedTuple):
    documents: np.ndarray
    length: int  # tokens of a row
    most_supervised: int
    order: Shuffled  # of the documents, see `shuffled`


class Buckets:
    """One document a row; rows go into a few buckets by length, and a batch holds rows of one bucket."""

    def __init__(self, sizes: Sizes, *, batch_size: int, seed: int, num_buckets: int, last_batch: LastBatch = "fill"):
        """
        Raises:
            InputError: no bucket fills a batch, where partial ones are dropped.
        """
        self.kept = sizes.usable()
        lengths = sizes.lengths[self.kept]
        edges = _edges(lengths, num_buckets, batch_size if last_batch == "drop" else 1)
        bucket = np.searchsorted(edges, lengths)
        members = [self.kept[bucket == i] for i in range(len(edges))]
        counts = [_batches_of(len(documents), batch_size, last_batch) for documents in members]
        self._buckets = [
            _Bucket(documents, edge, int(sizes.supervised[documents].max()), shuffled(len(documents), seed, 0, i))
            for i, (edge, documents) in enumerate(zip(edges, members, strict=True))
        ]
        self._first_batch = np.concatenate([[0], np.cumsum(counts)])
        self._batch_size = batch_size
        self._last_batch: LastBatch = last_batch
        self._partial = sum(len(documents) % batch_size for documents in members)
        self.steps_per_epoch = int(self._first_batch[-1])
        _check_steps(self.steps_per_epoch, len(self.kept), batch_size)
        self._order = shuffled(self.steps_per_epoch, seed, 1)

    def rows(self, step: int) -> BatchRows:
        epoch, number = step // self.steps_per_epoch, int(self._order[step])
        at = int(np.searchsorted(self._first_batch, number, side="right")) - 1
        bucket, first = self._buckets[at], (number - int(self._first_batch[at])) * self._batch_size
        size = len(bucket.documents)
        span = range(first, min(first + self._batch_size, size))
        chosen = [bucket.documents[[bucket.order[epoch * size + i]]] for i in span]
        return BatchRows(chosen, bucket.length, round_up(bucket.most_supervised, 32))

    def describe(self) -> str:
        lengths = " and ".join(str(bucket.length) for bucket in self._buckets)
        return (
            f"{len(self.kept)} documents in rows of {lengths} tokens, {self.steps_per_epoch} steps an epoch"
            + _say_partial(self._partial, self._last_batch)
        )


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


class Packed:
    """Documents share rows of one length: put together once, by first fit in an order that the seed gives. Which share
    a row does not matter to the mathematics: no query sees another document and nothing is supervised across an end.
    """

    def __init__(self, sizes: Sizes, *, batch_size: int, seed: int, length: int, last_batch: LastBatch = "fill"):
        """
        Args:
            length: tokens of a row. A longer document is cut there.

        Raises:
            InputError: the rows fill no batch, where partial ones are dropped.
        """
        self.kept = sizes.usable()
        cut = np.minimum(sizes.lengths[self.kept], length)
        order = np.random.default_rng((seed, 0)).permutation(len(self.kept))
        self._rows = [self.kept[order[members]] for members in first_fit(cut[order].tolist(), length)]
        most = max(int(sizes.supervised[members].sum()) for members in self._rows)
        self._length, self._most_supervised = length, min(round_up(most, 32), length)
        self._batch_size = batch_size
        self._last_batch: LastBatch = last_batch
        self.steps_per_epoch = _batches_of(len(self._rows), batch_size, last_batch)
        _check_steps(self.steps_per_epoch, len(self._rows), batch_size)
        self._order = shuffled(len(self._rows), seed, 2)
        lost = int((sizes.lengths[self.kept] - cut).sum())
        self.facts = PackingFacts(len(self._rows), len(self.kept), int(cut.sum()), lost, length)

    def rows(self, step: int) -> BatchRows:
        epoch, index = divmod(step, self.steps_per_epoch)
        at = index * self._batch_size
        span = range(at, min(at + self._batch_size, len(self._rows)))
        chosen = [self._rows[self._order[epoch * len(self._rows) + i]] for i in span]
        return BatchRows(chosen, self._length, self._most_supervised)

    def describe(self) -> str:
        facts = self.facts
        return (
            f"{facts.documents} documents packed into {facts.rows} rows of {facts.length} tokens, {facts.fill:.0%} full"
            + (f"; {facts.cut} tokens behind {facts.length} left out" if facts.cut else "")
            + f"; {self.steps_per_epoch} steps an epoch"
            + _say_partial(facts.rows % self._batch_size, self._last_batch)
        )
