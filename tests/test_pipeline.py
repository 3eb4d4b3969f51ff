"""Batches are a function of (seed, step); every epoch holds every row once; nothing supervised is lost."""

import dataclasses

import jax
import numpy as np
import pytest

from flaxdraft.algorithms.eagle3 import Algorithm, supervision
from flaxdraft.data.generation import Row
from flaxdraft.data.pipeline import Pipeline, collate
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Features

E = 4
ALGORITHM = Algorithm(3)


def make_row(mark: int, num_prompt: int, num_answer: int) -> Row:
    """A row whose first token is its mark; every feature differs, and none is zero."""
    num = num_prompt + num_answer
    rng = np.random.default_rng(mark)
    features = Features(
        taps_BT3E=rng.normal(size=(num, 3, E)).astype(np.float32),
        last_BTE=rng.normal(size=(num, E)).astype(np.float32),
        argmax_BT=rng.integers(1, 99, num).astype(np.int32),
        logsumexp_BT=rng.normal(size=num).astype(np.float32),
    )
    return Row(np.concatenate([[mark], rng.integers(1, 99, num - 1)]).astype(np.int32), num_prompt, features)


def make_rows(num: int) -> list[Row]:
    rng = np.random.default_rng(7)
    return [make_row(1000 + i, int(rng.integers(2, 30)), int(rng.integers(2, 50))) for i in range(num)]


def make_pipeline(rows, **fields):
    return Pipeline(rows, ALGORITHM, **{"batch_size": 4, "seed": 3, "num_buckets": 2} | fields)


def marks(host) -> list[int]:
    """The rows of a batch; empty ones left out."""
    return [int(tokens[0]) for tokens, segments in zip(host.batch.tokens_BT, host.batch.segments_BT, strict=True)
            if segments.any()]  # fmt: skip


def epoch_marks(pipeline, epoch: int) -> list[int]:
    steps = range(epoch * pipeline.steps_per_epoch, (epoch + 1) * pipeline.steps_per_epoch)
    return [mark for step in steps for mark in marks(pipeline.batch(step))]


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(dataclasses.astuple(a)), jax.tree.leaves(dataclasses.astuple(b)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("num_rows", [1, 3, 4, 23])
@pytest.mark.parametrize("num_buckets", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_every_row_appears_exactly_once_an_epoch(num_rows, num_buckets, batch_size):
    pipeline = make_pipeline(make_rows(num_rows), num_buckets=num_buckets, batch_size=batch_size)
    for epoch in (0, 1, 5):
        assert sorted(epoch_marks(pipeline, epoch)) == list(range(1000, 1000 + num_rows))


def test_epochs_are_shuffled_anew():
    pipeline = make_pipeline(make_rows(23))
    orders = [tuple(epoch_marks(pipeline, epoch)) for epoch in range(4)]
    assert len(set(orders)) == 4
    assert orders[0] != tuple(sorted(orders[0]))


def test_a_batch_depends_on_seed_and_step_alone():
    rows = make_rows(23)
    forward = make_pipeline(rows)
    steps = range(3 * forward.steps_per_epoch)
    want = [forward.batch(step) for step in steps]
    backward = make_pipeline(rows)  # any order of asking, and a fresh object that seeks at once
    for step in reversed(steps):
        assert_equal(backward.batch(step), want[step])
    assert_equal(make_pipeline(rows).batch(steps[-1]), want[-1])
    other = make_pipeline(rows, seed=4)
    assert [marks(other.batch(step)) for step in steps] != [marks(host) for host in want]


def test_rows_are_grouped_by_length_and_shapes_are_few():
    rows = make_rows(40)
    pipeline = make_pipeline(rows, num_buckets=3)
    hosts = [pipeline.batch(step) for step in range(pipeline.steps_per_epoch)]
    lengths = {host.batch.tokens_BT.shape[1] for host in hosts}
    assert len(lengths) <= 3
    assert all(length % 32 == 0 for length in lengths)
    by_mark = {int(row.tokens[0]): len(row.tokens) for row in rows}
    for host in hosts:  # a row never sits in a bucket when a shorter one would hold it
        length = host.batch.tokens_BT.shape[1]
        shorter = max((other for other in lengths if other < length), default=0)
        assert all(shorter < by_mark[mark] <= length for mark in marks(host))
    assert len({host.rows_BR.shape for host in hosts}) == 1
    assert {host.batch.tokens_BT.shape[0] for host in hosts} == {4}


def test_rows_hold_every_supervised_row():
    pipeline = make_pipeline(make_rows(23))
    for step in range(pipeline.steps_per_epoch):
        host = pipeline.batch(step)
        mask_BT = supervision(host.batch.assistant_BT, host.batch.segments_BT, ALGORITHM.num_steps).any(0)
        length = mask_BT.shape[1]
        assert mask_BT.any()
        for mask, kept in zip(mask_BT, host.rows_BR, strict=True):
            real = kept[kept < length]
            assert (np.diff(real) > 0).all()
            assert real.tolist() == np.flatnonzero(mask).tolist()


def test_collate_pads_with_nothing_supervised():
    rows = [make_row(5, 3, 4), make_row(6, 2, 8)]
    host = collate(rows, 3, 16, 8, ALGORITHM)
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
    np.testing.assert_array_equal(batch.positions_BT, np.tile(np.arange(16), (3, 1)))
    assert not batch.segments_BT[2].any()
    assert not batch.assistant_BT[2].any()
    # The row before the answer up to two before its end; 16, past the end, is padding.
    assert host.rows_BR.tolist() == [[2, 3, 4] + [16] * 5, [1, 2, 3, 4, 5, 6, 7, 16], [16] * 8]


def test_features_keep_their_stored_dtype():
    row = make_row(5, 3, 4)
    half = dataclasses.replace(row.features, taps_BT3E=row.features.taps_BT3E.astype(np.float16))
    host = collate([dataclasses.replace(row, features=half)], 2, 16, 8, ALGORITHM)
    assert host.features.taps_BT3E.dtype == np.float16
    assert host.features.last_BTE.dtype == np.float32


def test_answers_of_one_token_are_left_out():
    rows = [*make_rows(5), make_row(2000, 6, 1), make_row(2001, 6, 0)]
    assert sorted(epoch_marks(make_pipeline(rows), 0)) == list(range(1000, 1005))
    with pytest.raises(InputError, match="no answer has two tokens or more"):
        make_pipeline(rows[5:])


def test_more_unroll_steps_than_any_answer_has_are_refused():
    with pytest.raises(InputError, match=r"ttt_length: found 3, but the longest answer has 3 tokens.* most 2"):
        make_pipeline([make_row(1, 4, 3), make_row(2, 4, 2)])
