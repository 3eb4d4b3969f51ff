"""Equivariances of the unroll and its sums, for any layout of documents (hypothesis).

Shapes are fixed, so that each draft compiles once; hypothesis chooses what stands in them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from eagle3 import algorithm
from hypothesis import given, settings
from hypothesis import strategies as st
from jitted import loss_sums, unroll
from test_contracts import DRAFTS, V, W, make_draft

from flaxdraft.algorithms.eagle3.objective import ChosenRows, supervised_rows, supervision
from flaxdraft.interfaces import Batch, Example, Features

pytestmark = pytest.mark.numeric

B, T, J = 2, 16, 3
ALGORITHM = algorithm(J)
PLAIN = settings(deadline=None, derandomize=True, max_examples=15, database=None)
seeds = st.integers(0, 2**16)
both = pytest.mark.parametrize("name", DRAFTS)


@pytest.fixture(scope="module")
def drafts():
    return {name: make_draft(module) for name, module in DRAFTS.items()}


def make_example(seed: int, segments_BT: np.ndarray, positions_BT: np.ndarray) -> Example:
    """Random tokens, features and answers in a given layout; every row is listed."""
    rng = np.random.default_rng(seed)
    shape = segments_BT.shape
    tokens = rng.integers(0, V, shape)
    # A bit of history makes spans long enough for every step.
    assistant = (rng.random(shape) < 0.8) & (segments_BT > 0)
    batch = Batch(*(jnp.asarray(x) for x in (tokens, assistant, segments_BT, positions_BT)))
    taps, last = (jnp.asarray(rng.normal(size=(*shape, *tail)), jnp.float32) for tail in ((3, 32), (32,)))
    argmax = jnp.asarray(rng.integers(0, V, shape))
    features = Features(taps, last, argmax, jnp.full(shape, 4.0))
    rows = jnp.tile(jnp.arange(shape[1], dtype=jnp.int32), (shape[0], 1))
    return Example(
        batch, features, ChosenRows(rows), jnp.asarray(np.random.default_rng(0).normal(size=(W, 32)), jnp.float32)
    )


def rows_of(example: Example, index) -> Example:
    """The example at other places of [B, T]; `index` picks from every array with these two leading axes."""
    per_row = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[index]), (example.batch, example.features))
    num_batch, num_rows = per_row[0].tokens_BT.shape
    rows = jnp.tile(jnp.arange(num_rows, dtype=jnp.int32), (num_batch, 1))
    return Example(*per_row, ChosenRows(rows), example.teacher)


def hidden_of(draft, example: Example) -> np.ndarray:
    """[J, B, T, D]: the draft's output of every step at every row."""
    steps = unroll(draft, example.batch, example.features.taps_BTKE, example.chosen.rows_BR, J)
    return np.asarray(jnp.stack(steps))


def supervised(example: Example) -> np.ndarray:
    return np.asarray(supervision(np.asarray(example.batch.assistant_BT), np.asarray(example.batch.segments_BT), J))


def assert_same_sums(got, want) -> None:
    assert_close(got, want, ulp=80, of="each")


def documents(lengths, num_rows=T) -> tuple[np.ndarray, np.ndarray]:
    """(segments, positions) of one row of documents, padded at the end."""
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    positions = np.concatenate([np.arange(n) for n in lengths])
    pad = (0, num_rows - len(segments))
    return np.pad(segments, pad).astype(np.int32), np.pad(positions, pad).astype(np.int32)


# Any split of a row into up to three documents and padding.
layouts = st.lists(st.integers(0, T), min_size=3, max_size=3).map(
    lambda cuts: [n for n in np.diff([0, *sorted(cuts)]).tolist() if n > 0] or [T]
)


def layout_of(*rows) -> tuple[np.ndarray, np.ndarray]:
    segments, positions = zip(*(documents(lengths) for lengths in rows), strict=True)
    return np.stack(segments), np.stack(positions)


@both
@PLAIN
@given(seed=seeds, first=layouts, second=layouts)
def test_what_stands_in_the_padding_changes_nothing(drafts, name, seed, first, second):
    one = make_example(seed, *layout_of(first, second))
    pad = np.asarray(one.batch.segments_BT) == 0
    noise = make_example(seed + 1, *layout_of(first, second))

    def swap(a, b):
        return jnp.where(pad.reshape(*pad.shape, *[1] * (a.ndim - 2)), b, a)

    batch = dataclasses.replace(
        one.batch,
        tokens_BT=swap(one.batch.tokens_BT, noise.batch.tokens_BT),
        assistant_BT=swap(one.batch.assistant_BT, jnp.ones_like(one.batch.assistant_BT)),
    )
    other = dataclasses.replace(one, batch=batch, features=jax.tree.map(swap, one.features, noise.features))
    # Rows that read past their document's end are supervised by no step; only they see the padding's tokens.
    mask = supervised(one)
    np.testing.assert_array_equal(supervised(other), mask)
    got, want = hidden_of(drafts[name], other), hidden_of(drafts[name], one)
    assert_close(got[mask], want[mask], ulp=32)
    assert_same_sums(loss_sums(ALGORITHM, drafts[name], other), loss_sums(ALGORITHM, drafts[name], one))


@both
@PLAIN
@given(seed=seeds, first=layouts, second=layouts)
def test_more_padding_changes_nothing(drafts, name, seed, first, second):
    short = make_example(seed, *layout_of(first, second))

    def widen(x):
        return jnp.pad(x, ((0, 0), (0, 8), *[(0, 0)] * (x.ndim - 2)))

    batch, features = jax.tree.map(widen, (short.batch, short.features))
    rows = jnp.tile(jnp.arange(T + 8, dtype=jnp.int32), (B, 1))
    long = Example(batch, features, ChosenRows(rows), short.teacher)
    mask = supervised(short)
    assert not supervised(long)[:, :, T:].any()
    got = hidden_of(drafts[name], long)[:, :, :T]
    assert_close(got[mask], hidden_of(drafts[name], short)[mask], ulp=32)
    assert_same_sums(loss_sums(ALGORITHM, drafts[name], long), loss_sums(ALGORITHM, drafts[name], short))


@both
@PLAIN
@given(seed=seeds, cut=st.integers(1, T - 1))
def test_two_documents_packed_equal_the_same_apart(drafts, name, seed, cut):
    """One row with both against two rows with one each, padded at the end."""
    packed = make_example(seed, *layout_of([cut, T - cut], [cut, T - cut]))
    places = np.minimum(np.arange(T), cut - 1), np.minimum(np.arange(T) + cut, T - 1)
    real = np.stack([np.arange(T) < cut, np.arange(T) < T - cut])
    apart = rows_of(packed, (np.zeros((2, 1), int), np.stack(places)))
    batch = dataclasses.replace(
        apart.batch, segments_BT=jnp.asarray(real.astype(np.int32)), positions_BT=jnp.tile(jnp.arange(T), (2, 1)),
        assistant_BT=apart.batch.assistant_BT & real,
    )  # fmt: skip
    apart = dataclasses.replace(apart, batch=batch)
    mask = supervised(apart)
    together = np.stack([hidden_of(drafts[name], packed)[:, 0, place] for place in places], axis=1)
    np.testing.assert_array_equal(np.stack([supervised(packed)[:, 0, place] for place in places], axis=1) & real, mask)
    assert_close(together[mask], hidden_of(drafts[name], apart)[mask], ulp=32)
    # The second packed row is there for the shape alone: its sums are taken away.
    batch = dataclasses.replace(packed.batch, assistant_BT=packed.batch.assistant_BT.at[1].set(False))
    alone = dataclasses.replace(packed, batch=batch)
    assert_same_sums(loss_sums(ALGORITHM, drafts[name], apart), loss_sums(ALGORITHM, drafts[name], alone))


@both
@PLAIN
@given(seed=seeds, first=layouts, second=layouts)
def test_permuting_the_batch_permutes_the_result(drafts, name, seed, first, second):
    one = make_example(seed, *layout_of(first, second))
    turned = rows_of(one, np.array([1, 0]))
    assert_close(hidden_of(drafts[name], turned), hidden_of(drafts[name], one)[:, ::-1], ulp=32)
    assert_same_sums(loss_sums(ALGORITHM, drafts[name], turned), loss_sums(ALGORITHM, drafts[name], one))


@both
@PLAIN
@given(seed=seeds, cut=st.integers(0, T - 1))
def test_a_row_does_not_see_its_future(drafts, name, seed, cut):
    """Row p of step j reads tapped states up to p and tokens up to p + 1 + j."""
    one = make_example(seed, *layout_of([T], [T]))
    noise = make_example(seed + 1, *layout_of([T], [T]))
    before = np.arange(T) <= cut
    taps = jnp.where(before[None, :, None, None], one.features.taps_BTKE, noise.features.taps_BTKE)
    hidden = hidden_of(drafts[name], one)
    for j in range(J):
        tokens = jnp.where(np.arange(T)[None] <= cut + 1 + j, one.batch.tokens_BT, noise.batch.tokens_BT)
        other = dataclasses.replace(
            one, batch=dataclasses.replace(one.batch, tokens_BT=tokens),
            features=dataclasses.replace(one.features, taps_BTKE=taps),
        )  # fmt: skip
        assert_close(hidden_of(drafts[name], other)[j][:, before], hidden[j][:, before], ulp=32)


@PLAIN
@given(span=st.tuples(st.integers(1, T - 1), st.integers(1, T - 1)).map(sorted), num_steps=st.integers(1, 2 * T))
def test_an_answer_is_supervised_from_the_row_before_it_to_two_before_its_end(span, num_steps):
    """a, b: the first and last token of the assistant. Row a-1 drafts the answer's second token right after prefill;
    from row b-1 on there is nothing left to predict."""
    a, b = span
    assistant = np.zeros((1, T), bool)
    assistant[0, a : b + 1] = True
    segments = np.ones((1, T), np.int32)
    for j, mask in enumerate(supervision(assistant, segments, num_steps)):
        assert np.flatnonzero(mask[0]).tolist() == list(range(a - 1, b - 1 - j))  # row a-1 while the answer lasts
        assert not mask[0, max(b - 1, 0) :].any()
    rows = [row for row in supervised_rows(assistant, segments)[0].tolist() if row < T]
    assert rows == list(range(a - 1, b - 1))
