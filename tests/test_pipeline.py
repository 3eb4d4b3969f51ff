"""Batches are a function of (seed, step) on every number of hosts; every epoch holds every row once; nothing supervised
is lost; reading ahead changes nothing and is bounded."""

import dataclasses
import threading
import time
from itertools import islice

import jax
import numpy as np
import pytest
from eagle3 import algorithm

from flaxdraft.algorithms.eagle3.objective import supervision
from flaxdraft.config import DataConfig, TrainConfig
from flaxdraft.data.documents import Answer, AnsweredPrompts, Document, as_document
from flaxdraft.data.pipeline import batches_from, collate, make_pipeline
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Draw, Features

E = 4
ALGORITHM = algorithm(3)


def make_row(mark: int, num_prompt: int, num_answer: int) -> Answer:
    """A row whose first token is its mark; every feature differs, and none is zero."""
    num = num_prompt + num_answer
    rng = np.random.default_rng(mark)
    features = Features(
        taps_BTKE=rng.normal(size=(num, 3, E)).astype(np.float32),
        last_BTE=rng.normal(size=(num, E)).astype(np.float32),
        argmax_BT=rng.integers(1, 99, num).astype(np.int32),
        logsumexp_BT=rng.normal(size=num).astype(np.float32),
    )
    return Answer(np.concatenate([[mark], rng.integers(1, 99, num - 1)]).astype(np.int32), num_prompt, features)


def make_rows(num: int) -> list[Answer]:
    rng = np.random.default_rng(7)
    return [make_row(1000 + i, int(rng.integers(2, 30)), int(rng.integers(2, 50))) for i in range(num)]


def pipeline_of(documents, *, batch_size=4, seed=3, num_buckets=2, length=None, last_batch="fill", part=(0, 1)):
    """Packed where `length` is given, else in buckets."""
    train = TrainConfig(num_steps=1, batch_size=batch_size, length_buckets=num_buckets, pack_length=length)
    data = DataConfig(prompts="none", last_batch=last_batch)
    return make_pipeline(documents, ALGORITHM, train, data, seed, part)


def bucketed(rows, **fields):
    return pipeline_of(AnsweredPrompts(rows, 2100), **fields)


def marks(host) -> list[int]:
    """The rows of a batch; empty ones left out."""
    return [int(tokens[0]) for tokens, segments in zip(host.batch.tokens_BT, host.batch.segments_BT, strict=True)
            if segments.any()]  # fmt: skip


def epoch_marks(pipeline, epoch: int) -> list[int]:
    steps = range(epoch * pipeline.steps_per_epoch, (epoch + 1) * pipeline.steps_per_epoch)
    return [mark for step in steps for mark in marks(pipeline.batch(step))]


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("num_rows", [1, 3, 4, 23])
@pytest.mark.parametrize("num_buckets", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_every_row_appears_exactly_once_an_epoch(num_rows, num_buckets, batch_size):
    pipeline = bucketed(make_rows(num_rows), num_buckets=num_buckets, batch_size=batch_size)
    for epoch in (0, 1, 5):
        assert sorted(epoch_marks(pipeline, epoch)) == list(range(1000, 1000 + num_rows))


def test_epochs_are_shuffled_anew():
    pipeline = bucketed(make_rows(23))
    orders = [tuple(epoch_marks(pipeline, epoch)) for epoch in range(4)]
    assert len(set(orders)) == 4
    assert orders[0] != tuple(sorted(orders[0]))


def test_a_batch_depends_on_seed_and_step_alone():
    rows = make_rows(23)
    forward = bucketed(rows)
    steps = range(3 * forward.steps_per_epoch)
    want = [forward.batch(step) for step in steps]
    backward = bucketed(rows)  # any order of asking, and a fresh object that seeks at once
    for step in reversed(steps):
        assert_equal(backward.batch(step), want[step])
    assert_equal(bucketed(rows).batch(steps[-1]), want[-1])
    other = bucketed(rows, seed=4)
    assert [marks(other.batch(step)) for step in steps] != [marks(host) for host in want]


def test_rows_are_grouped_by_length_and_shapes_are_few():
    rows = make_rows(40)
    pipeline = bucketed(rows, num_buckets=3)
    hosts = [pipeline.batch(step) for step in range(pipeline.steps_per_epoch)]
    lengths = {host.batch.tokens_BT.shape[1] for host in hosts}
    assert len(lengths) <= 3
    assert all(length % 32 == 0 for length in lengths)
    by_mark = {int(row.tokens[0]): len(row.tokens) for row in rows}
    for host in hosts:  # a row never sits in a bucket when a shorter one would hold it
        length = host.batch.tokens_BT.shape[1]
        shorter = max((other for other in lengths if other < length), default=0)
        assert all(shorter < by_mark[mark] <= length for mark in marks(host))
    shapes = {(host.batch.tokens_BT.shape, host.chosen.rows_BR.shape) for host in hosts}
    assert len(shapes) == len(lengths)
    assert {host.batch.tokens_BT.shape[0] for host in hosts} == {4}


def test_rows_hold_every_supervised_row():
    pipeline = bucketed(make_rows(23))
    for step in range(pipeline.steps_per_epoch):
        host = pipeline.batch(step)
        mask_BT = supervision(host.batch.assistant_BT, host.batch.segments_BT, ALGORITHM.settings.ttt_length).any(0)
        length = mask_BT.shape[1]
        assert mask_BT.any()
        for mask, kept in zip(mask_BT, host.chosen.rows_BR, strict=True):
            real = kept[kept < length]
            assert (np.diff(real) > 0).all()
            assert real.tolist() == np.flatnonzero(mask).tolist()


def test_collate_pads_with_nothing_supervised():
    rows = [make_row(5, 3, 4), make_row(6, 2, 8)]
    host = collate([[as_document(row)] for row in rows], rows[0].features, 3, 16, 8, ALGORITHM, Draw(0, 0, 0))
    batch = host.batch
    assert batch.tokens_BT.shape == (3, 16)
    for i, row in enumerate(rows):
        num = len(row.tokens)
        np.testing.assert_array_equal(batch.tokens_BT[i], np.pad(row.tokens, (0, 16 - num)))
        assert np.flatnonzero(batch.assistant_BT[i]).tolist() == list(range(row.num_prompt, num))
        assert np.flatnonzero(batch.segments_BT[i]).tolist() == list(range(num))
        for field in dataclasses.fields(Features):
            got = getattr(host.features, field.name)[i]
            np.testing.assert_array_equal(got[:num], getattr(row.features, field.name), err_msg=field.name)
            assert not got[num:].any()
        assert batch.positions_BT[i].tolist() == [*range(num), *[0] * (16 - num)]
    assert not batch.segments_BT[2].any()
    assert not batch.assistant_BT[2].any()
    # The row before the answer up to two before its end; 16, past the end, is padding.
    assert host.chosen.rows_BR.tolist() == [[2, 3, 4] + [16] * 5, [1, 2, 3, 4, 5, 6, 7, 16], [16] * 8]


def test_features_keep_their_stored_dtype():
    row = make_row(5, 3, 4)
    half = dataclasses.replace(row.features, taps_BTKE=row.features.taps_BTKE.astype(np.float16))
    host = collate([[as_document(dataclasses.replace(row, features=half))]], half, 2, 16, 8, ALGORITHM, Draw(0, 0, 0))
    assert host.features.taps_BTKE.dtype == np.float16
    assert host.features.last_BTE.dtype == np.float32


def test_answers_of_one_token_are_left_out():
    rows = [*make_rows(5), make_row(2000, 6, 1), make_row(2001, 6, 0)]
    assert sorted(epoch_marks(bucketed(rows), 0)) == list(range(1000, 1005))
    with pytest.raises(InputError, match="no answer has two tokens or more"):
        bucketed(rows[5:])


def test_more_unroll_steps_than_any_answer_has_are_refused():
    with pytest.raises(InputError, match=r"ttt_length: found 3, but the longest answer has 3 tokens.* most 2"):
        bucketed([make_row(1, 4, 3), make_row(2, 4, 2)])


KINDS = {"buckets": {}, "packed": {"length": 96}}


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_of_all_hosts_are_the_global_batch(kind, hosts):
    rows = make_rows(23)
    whole = bucketed(rows, **KINDS[kind])
    parts = [bucketed(rows, part=(i, hosts), **KINDS[kind]) for i in range(hosts)]
    for step in (*range(whole.steps_per_epoch), 5 * whole.steps_per_epoch + 1):
        joined = jax.tree.map(lambda *x: np.concatenate(x), *(part.batch(step) for part in parts))
        for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(whole.batch(step)), strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(InputError, match=r"train.batch_size: 4 rows cannot be split over 3 hosts"):
        bucketed(rows, part=(0, 3), **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_partial_batches_are_filled_or_dropped_as_configured(kind):
    """Dropped rows are others in every epoch."""
    rows = make_rows(23)
    filled, dropped = (bucketed(rows, last_batch=how, **KINDS[kind]) for how in ("fill", "drop"))
    assert f"{filled.steps_per_epoch} steps an epoch; " in filled.layout.describe()
    assert "join partial batches, filled up with empty rows (data.last_batch=fill)" in filled.layout.describe()
    assert "are left out of each epoch (data.last_batch=drop)" in dropped.layout.describe()
    for step in range(3 * dropped.steps_per_epoch):
        assert dropped.batch(step).batch.segments_BT.any(axis=1).all()
    assert any(not filled.batch(step).batch.segments_BT.any(axis=1).all() for step in range(filled.steps_per_epoch))
    seen = [set(epoch_marks(dropped, epoch)) for epoch in range(8)]
    assert all(len(marks) < 23 for marks in seen)
    assert set.union(*seen) == set(epoch_marks(filled, 0)) or kind == "packed"
    with pytest.raises(InputError, match=r"data.last_batch: drop leaves nothing of \d+ rows"):
        bucketed(rows[:3], last_batch="drop", **KINDS[kind])


class Counted(AnsweredPrompts):
    """Says how often it was read, and by which thread."""

    def __init__(self, rows):
        super().__init__(rows, 2100)
        self.reads, self.threads = [], set()

    def row(self, index) -> Document:
        self.reads.append(index)
        self.threads.add(threading.get_ident())
        return super().row(index)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_reading_ahead_gives_the_same_batches_from_any_step_on(kind, prefetch):
    pipeline = bucketed(make_rows(23), **KINDS[kind])
    want = [pipeline.batch(step) for step in range(12)]
    for start in (0, 7):
        got = list(batches_from(pipeline, start, 12, prefetch))
        assert len(got) == 12 - start
        for a, b in zip(got, want[start:], strict=True):
            assert_equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seek_reads_nothing_but_the_batch_that_is_asked_for(kind):
    documents = Counted(make_rows(23))
    pipeline = pipeline_of(documents, **KINDS[kind])
    assert len(documents.reads) == 1  # for the types of the features
    documents.reads.clear()
    batch = next(batches_from(pipeline, 10**9, 10**9 + 1, 2))
    there = {int(mark) - 1000 for mark in batch.batch.tokens_BT[batch.batch.segments_BT > 0] if mark >= 1000}
    assert set(documents.reads) == there
    assert_equal(batch, pipeline.batch(10**9))


@pytest.mark.parametrize("prefetch", [1, 4])
def test_no_more_is_read_ahead_than_configured(prefetch):
    documents = Counted(make_rows(24))
    pipeline = pipeline_of(documents, num_buckets=1)
    documents.reads.clear()
    documents.threads.clear()
    batches = batches_from(pipeline, 0, 1000, prefetch)
    for more, taken in ((1, 1), (5, 6)):
        assert len(list(islice(batches, more))) == more
        allowed, deadline = 4 * (taken + prefetch), time.monotonic() + 30
        while len(documents.reads) < allowed and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)  # a thread that reads on would do so now
        assert len(documents.reads) == allowed
    assert threading.get_ident() not in documents.threads
    batches.close()
    assert next(batches, None) is None


def test_what_cannot_be_read_is_said_where_it_is_needed():
    documents = Counted(make_rows(8))
    pipeline = pipeline_of(documents, num_buckets=1, seed=1)
    bad = int(pipeline.layout.rows(1).documents[2][0])

    def row(index):
        if index == bad:
            raise InputError("shard-00003.safetensors: row 5")
        return AnsweredPrompts.row(documents, index)

    documents.row = row
    batches = batches_from(pipeline, 0, 4, 2)
    assert_equal(next(batches), pipeline.batch(0))
    with pytest.raises(InputError, match=r"shard-00003.safetensors: row 5"):
        next(batches)


def test_documents_without_features_stay_without():
    pipeline = bucketed([dataclasses.replace(row, features=None) for row in make_rows(5)])
    assert pipeline.batch(0).features is None
