"""Packed batches: every document once an epoch, whole and by itself, whoever asks for which part of which step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from eagle3 import algorithm as make_algorithm
from hypothesis import given, settings
from hypothesis import strategies as st
from test_contracts import DRAFTS, V, W, make_draft
from test_pipeline import assert_equal, bucketed, make_row, make_rows

from flaxdraft.algorithms.eagle3.objective import supervision
from flaxdraft.data.batching import Buckets, Packed, Sizes, first_fit
from flaxdraft.data.documents import AnsweredPrompts
from flaxdraft.data.pipeline import Pipeline
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Features

LENGTH = 96


def make_packed(rows, **fields):
    return bucketed(rows, length=LENGTH, **fields)


def documents(host):
    """(mark, tokens) of every document of a batch."""
    out = []
    for tokens, segments in zip(host.batch.tokens_BT, host.batch.segments_BT, strict=True):
        for number in range(1, segments.max() + 1):
            out.append((int(tokens[segments == number][0]), tokens[segments == number]))
    return out


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60))
def test_first_fit_is_the_plain_loop(sizes):
    room, want = [], []
    for item, size in enumerate(sizes):
        at = next((i for i, left in enumerate(room) if left >= size), len(room))
        if at == len(room):
            room.append(50)
            want.append([])
        room[at] -= size
        want[at].append(item)
    assert first_fit(sizes, 50) == want


def test_first_fit_is_quick():
    """A hundred thousand documents in seconds: the plain loop takes minutes."""
    sizes = np.random.default_rng(0).integers(1, 4096, 100_000).tolist()
    bins = first_fit(sizes, 4096)
    assert sum(map(len, bins)) == len(sizes)
    assert sum(sizes) / (len(bins) * 4096) > 0.98


@pytest.mark.parametrize("num_rows", [1, 3, 23])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_every_document_appears_exactly_once_an_epoch(num_rows, batch_size):
    rows = make_rows(num_rows)
    packed = make_packed(rows, batch_size=batch_size)
    for epoch in (0, 3):
        steps = range(epoch * packed.steps_per_epoch, (epoch + 1) * packed.steps_per_epoch)
        found = sorted((document for step in steps for document in documents(packed.batch(step))), key=lambda x: x[0])
        assert [mark for mark, _ in found] == [1000 + i for i in range(num_rows)]
        for (_, tokens), row in zip(found, rows, strict=True):
            np.testing.assert_array_equal(tokens, row.tokens)
    assert packed.layout.facts.documents == num_rows
    assert packed.layout.facts.tokens == sum(len(row.tokens) for row in rows)


def test_documents_keep_their_own_arrays():
    rows = {1000 + i: row for i, row in enumerate(make_rows(23))}
    packed = make_packed(list(rows.values()))
    host = packed.batch(1)
    batch = host.batch
    assert batch.segments_BT.max() > 1
    for b in range(4):
        for number in range(1, batch.segments_BT[b].max() + 1):
            at = np.flatnonzero(batch.segments_BT[b] == number)
            row = rows[int(batch.tokens_BT[b, at[0]])]
            np.testing.assert_array_equal(np.diff(at), 1)
            np.testing.assert_array_equal(batch.positions_BT[b, at], np.arange(len(at)))
            np.testing.assert_array_equal(batch.assistant_BT[b, at], np.arange(len(at)) >= row.num_prompt)
            for field in dataclasses.fields(Features):
                np.testing.assert_array_equal(
                    getattr(host.features, field.name)[b, at], getattr(row.features, field.name)
                )
        outside = batch.segments_BT[b] == 0
        assert not batch.assistant_BT[b, outside].any()
        supervised = np.flatnonzero(supervision(batch.assistant_BT, batch.segments_BT, 1)[0, b])
        kept = host.chosen.rows_BR[b][host.chosen.rows_BR[b] < LENGTH]
        np.testing.assert_array_equal(kept, supervised)


def test_a_batch_depends_on_seed_and_step_alone():
    one, other = make_packed(make_rows(23)), make_packed(make_rows(23))
    for step in (7, 0, 30, 7, 1):
        assert_equal(one.batch(step), other.batch(step))
    marks = [tuple(mark for mark, _ in documents(one.batch(step))) for step in (0, one.steps_per_epoch)]
    assert marks[0] != marks[1]
    assert [m for m, _ in documents(make_packed(make_rows(23), seed=4).batch(0))] != list(marks[0])


def test_longer_documents_are_cut_and_counted():
    packed = make_packed([make_row(5, 30, 100), make_row(6, 4, 20)])
    assert packed.layout.facts.cut == 130 - LENGTH
    found = dict(documents(packed.batch(0)))
    assert len(found[5]) == LENGTH
    assert len(found[6]) == 24


def test_nothing_to_supervise_is_refused():
    with pytest.raises(InputError, match="no answer has two tokens or more"):
        make_packed([make_row(1, 4, 1)])
    with pytest.raises(InputError, match="ttt_length: found 3, but the longest answer has 3 tokens"):
        make_packed([make_row(1, 4, 3)])


def epoch_sums(pipeline, loss_sums):
    total = None
    for step in range(pipeline.steps_per_epoch):
        host = pipeline.batch(step)
        sums = loss_sums(host)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    return total


@pytest.mark.numeric
def test_packed_rows_give_the_sums_of_separate_ones():
    """A whole epoch, packed and in buckets: the same sums, to rounding."""
    algorithm, draft, rng = make_algorithm(3), make_draft(DRAFTS["llama"]), np.random.default_rng(0)
    rows = []
    for row in make_rows(9):
        num = len(row.tokens)
        features = Features(
            rng.normal(size=(num, 3, 32)).astype(np.float32), rng.normal(size=(num, 32)).astype(np.float32),
            rng.integers(0, V, num).astype(np.int32), np.full(num, 6.0, np.float32),
        )  # fmt: skip
        rows.append(dataclasses.replace(row, tokens=row.tokens % V, features=features))
    head = jnp.asarray(rng.normal(size=(W, 32)) / 6, jnp.float32)

    @jax.jit
    def sums(host):
        return algorithm.sums(draft, dataclasses.replace(host, teacher=head), algorithm.first_carry())

    loss_sums = lambda host: sums(jax.tree.map(jnp.asarray, host))  # noqa: E731
    documents = AnsweredPrompts(rows, V)
    sizes = Sizes(documents.lengths, documents.supervised)
    packed = Pipeline(documents, algorithm, Packed(sizes, length=LENGTH, batch_size=2, seed=0), 2)
    apart = Pipeline(documents, algorithm, Buckets(sizes, batch_size=4, seed=0, num_buckets=1), 4)
    got, want = epoch_sums(packed, loss_sums), epoch_sums(apart, loss_sums)
    assert_close(got, want, ulp=80, of="each")
