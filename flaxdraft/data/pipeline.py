"""Training batches: batch(step) is a function of (seed, step) alone, and `batches_from` reads them ahead.

The position in the data is one integer, the step: it is the same on every number of hosts, and going there reads
nothing. A host reads its own rows of a global batch only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

import grain
import numpy as np

from flaxdraft.config import DataConfig, TrainConfig
from flaxdraft.data.batching import Buckets, Layout, Packed, Sizes
from flaxdraft.data.documents import Document, Documents
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Algorithm, Batch, Draw, Example, Features


def collate(
    rows: Iterable[Iterable[Document]], like: Features | None, num_rows: int, length: int, most_supervised: int,
    algorithm: Algorithm, draw: Draw,
) -> Example:  # fmt: skip
    """Documents end to end in their rows, cut at `length`; padded to `length` and to `num_rows` rows. One document is
    taken at a time.

    Args:
        like: features of any document, for their types; None where documents come without. Of them the algorithm gets
            what it needs.
        most_supervised: a bound on the supervised tokens of a row, from which the sizes of `Example.chosen` follow.
    """
    shape = (num_rows, length)
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    assistant = np.zeros(shape, bool)
    features: dict[str, np.ndarray] = {}
    for name in algorithm.needs if like is not None else ():
        sample = getattr(like, name)
        features[name] = np.zeros((*shape, *sample.shape[1:]), sample.dtype)
    for at, row in enumerate(rows):
        start = 0
        for number, document in enumerate(row, 1):
            num = min(len(document.tokens), length)
            span = (at, slice(start, start + num))
            tokens[span], assistant[span] = document.tokens[:num], document.assistant[:num]
            segments[span], positions[span] = number, np.arange(num)
            for name, array in features.items():
                array[span] = getattr(document.features, name)[:num]
            start += num
    batch = Batch(tokens, assistant, segments, positions)
    chosen = algorithm.choose(batch, most_supervised, draw)
    return Example(batch, Features(**features) if features else None, chosen)


def check_supervision(num_answer: Sequence[int] | np.ndarray, algorithm: Algorithm) -> None:
    """
    Raises:
        InputError: no row supervises anything; see `Algorithm.check_answers`.
    """
    if not len(num_answer):
        raise InputError("data: no answer has two tokens or more, so nothing is supervised")
    algorithm.check_answers(max(num_answer))


class Pipeline:
    """Random access to one host's share of the batches of a run."""

    def __init__(
        self, documents: Documents, algorithm: Algorithm, layout: Layout, batch_size: int,
        part: tuple[int, int] = (0, 1), seed: int = 0,
    ):  # fmt: skip
        """
        Args:
            batch_size: rows of a global batch.
            part: (i, n): this host's share of every global batch, the i-th n-th of its rows.
            seed: of what the algorithm draws.

        Raises:
            InputError: see `check_supervision`; the parts do not divide the batch.
        """
        if batch_size % part[1]:
            raise InputError(f"train.batch_size: {batch_size} rows cannot be split over {part[1]} hosts")
        self._documents, self._algorithm, self.layout = documents, algorithm, layout
        self._num_rows, self.part, self._seed = batch_size // part[1], part, seed
        self._like = documents.row(int(layout.kept[0])).features
        self.steps_per_epoch = layout.steps_per_epoch

    def batch(self, step: int) -> Example:
        """This host's rows of the batch of one optimizer step.

        Raises:
            InputError: a document cannot be read.
        """
        rows = self.layout.rows(step)
        first = self.part[0] * self._num_rows
        mine = rows.documents[first : first + self._num_rows]
        read = ((self._documents.row(int(index)) for index in row) for row in mine)
        draw = Draw(self._seed, step, first)
        return collate(read, self._like, self._num_rows, rows.length, rows.most_supervised, self._algorithm, draw)


def make_pipeline(
    documents: Documents, algorithm: Algorithm, train: TrainConfig, data: DataConfig, seed: int,
    part: tuple[int, int] = (0, 1),
) -> Pipeline:  # fmt: skip
    """The pipeline that a configuration asks for: packed (train.pack_length) or in buckets by length.

    Raises:
        InputError: see `check_supervision`, `Pipeline` and the layouts.
    """
    sizes = Sizes(documents.lengths, documents.supervised)
    check_supervision(documents.supervised[sizes.usable()], algorithm)
    common = {"batch_size": train.batch_size, "seed": seed, "last_batch": data.last_batch}
    if train.pack_length is None:
        layout: Layout = Buckets(sizes, num_buckets=train.length_buckets, **common)
    else:
        layout = Packed(sizes, length=train.pack_length, **common)
    return Pipeline(documents, algorithm, layout, train.batch_size, part, seed)


def batches_from(pipeline: Pipeline, start: int, stop: int, prefetch: int) -> Iterator[Example]:
    """The batches of steps start .. stop - 1, in order, read by threads while the caller works.

    Args:
        prefetch: batches that are read ahead at most; beside them there is only the one that the caller holds, which
            bounds memory. 0 reads each when it is asked for.

    Raises:
        InputError: a document cannot be read (at the batch that it is in).
    """
    options = grain.ReadOptions(num_threads=min(prefetch, os.cpu_count() or 1), prefetch_buffer_size=prefetch)
    batches = iter(grain.MapDataset.range(start, stop).map(pipeline.batch).to_iter_dataset(options))
    try:
        yield from batches
    finally:
        batches.close()
