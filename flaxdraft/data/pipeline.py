"""Training batches from captured rows: batch(step) is a function of (seed, step) alone, so a resume seeks for free.

Rows go into a few buckets by length; every epoch shuffles rows inside their bucket and the order of batches. A
bucket's last batch is filled up with empty rows, which supervise nothing: no row is dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from flaxdraft.data.generation import Row, round_up
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Algorithm, Batch, Features


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """Numpy arrays of one padded batch, ready to be put on devices."""

    batch: Batch
    features: Features
    rows_BR: np.ndarray


def collate(rows: Sequence[Row], batch_size: int, length: int, num_supervised: int, algorithm: Algorithm) -> HostBatch:
    """Right-pads rows to `length`, the batch to `batch_size`, and the supervised rows to `num_supervised`."""
    shape = (batch_size, length)
    tokens, assistant = np.zeros(shape, np.int32), np.zeros(shape, bool)
    segments, positions = np.zeros(shape, np.int32), np.tile(np.arange(length, dtype=np.int32), (batch_size, 1))
    features = {}
    for field in dataclasses.fields(Features):
        sample = getattr(rows[0].features, field.name)
        features[field.name] = np.zeros((*shape, *sample.shape[1:]), sample.dtype)
    for i, row in enumerate(rows):
        num = len(row.tokens)
        tokens[i, :num] = row.tokens
        assistant[i, row.num_prompt : num] = True
        segments[i, :num] = 1
        for name, array in features.items():
            array[i, :num] = getattr(row.features, name)
    kept = algorithm.rows(assistant, segments)
    rows_BR = np.full((batch_size, num_supervised), length, np.int32)
    rows_BR[:, : kept.shape[1]] = kept
    return HostBatch(Batch(tokens, assistant, segments, positions), Features(**features), rows_BR)


def check_supervision(num_answer: Sequence[int], algorithm: Algorithm) -> None:
    """
    Raises:
        InputError: no row supervises anything, or no answer is long enough for every unroll step.
    """
    if not len(num_answer):
        raise InputError("data: no answer has two tokens or more, so nothing is supervised")
    longest = max(num_answer)
    if algorithm.num_steps > longest - 1:
        raise InputError(
            f"algorithm.ttt_length: found {algorithm.num_steps}, but the longest answer has {longest} tokens, so "
            f"that step {algorithm.num_steps} would supervise nothing; expected at most {longest - 1}"
        )


class Batches(Protocol):
    """What a run is trained on: a batch for every step, whatever was asked for before."""

    steps_per_epoch: int

    def batch(self, step: int) -> HostBatch: ...


class Pipeline:
    """Random access to the batches of a run."""

    def __init__(
        self, rows: Sequence[Row], algorithm: Algorithm, *, batch_size: int, seed: int, num_buckets: int
    ):  # fmt: skip
        """
        Raises:
            InputError: see `check_supervision`.
        """
        self._rows = [row for row in rows if row.num_answer >= 2]
        check_supervision([row.num_answer for row in self._rows], algorithm)
        self._algorithm, self._batch_size, self._seed = algorithm, batch_size, seed
        lengths = np.array([len(row.tokens) for row in self._rows])
        edges = [int(np.quantile(lengths, (i + 1) / num_buckets, method="higher")) for i in range(num_buckets)]
        self._edges = sorted({round_up(edge, 32) for edge in edges})
        bucket = np.searchsorted(self._edges, lengths)
        self._buckets = [np.flatnonzero(bucket == i) for i in range(len(self._edges))]
        self._supervised = round_up(max(row.num_answer for row in self._rows), 32)
        self._planned: tuple[int, list] | None = None
        self.steps_per_epoch = len(self._plan(0))

    def _plan(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        if self._planned is None or self._planned[0] != epoch:
            rng = np.random.default_rng((self._seed, epoch))
            batches = []
            for i, members in enumerate(self._buckets):
                order = rng.permutation(members)
                batches += [(i, order[at : at + self._batch_size]) for at in range(0, len(order), self._batch_size)]
            self._planned = (epoch, [batches[i] for i in rng.permutation(len(batches))])
        return self._planned[1]

    def batch(self, step: int) -> HostBatch:
        """The batch of one optimizer step."""
        epoch, index = divmod(step, self.steps_per_epoch)
        bucket, members = self._plan(epoch)[index]
        rows = [self._rows[i] for i in members]
        return collate(rows, self._batch_size, self._edges[bucket], self._supervised, self._algorithm)
