"""Rows of one batch row dealt out to several devices."""

import dataclasses

import jax
import numpy as np
import pytest

from flaxdraft.algorithms.eagle3.objective import ChosenRows
from flaxdraft.algorithms.eagle3.shared_rows import dealt, share
from flaxdraft.interfaces import Batch, Example, Features


@pytest.mark.parametrize("num_shards", [1, 2, 3, 8])
@pytest.mark.parametrize("num_rows", [0, 1, 5, 40, 1000])
@pytest.mark.parametrize("num_steps", [1, 4, 7])
def test_every_row_has_one_owner_and_its_teachers_behind_it(num_rows, num_shards, num_steps):
    owners = np.zeros(num_rows, int)
    for places, mine in dealt(num_rows, num_shards, num_steps):
        assert (np.diff(places) > 0).all()
        owners[places[mine]] += 1
        listed = places.tolist()
        for i in np.flatnonzero(mine):  # rows r..r+J-1 follow each other in the list, as far as there are any
            behind = list(range(listed[i], min(listed[i] + num_steps, num_rows)))
            assert listed[i : i + len(behind)] == behind
        most = 2 * (-(-num_rows // (2 * num_shards)) + num_steps - 1)
        assert len(places) <= most
    assert (owners == 1).all()


def test_causal_work_is_even():
    """What a row sees grows with its place; runs of equal length taken in order would differ by a factor of 15."""
    seen = [places[mine].sum() for places, mine in dealt(4096, 8, 7)]
    assert max(seen) / min(seen) < 1.001
    in_order = [part.sum() for part in np.split(np.arange(4096), 8)]
    assert max(in_order) / min(in_order) > 14


def test_the_layout_holds_what_rows_read():
    rng = np.random.default_rng(0)
    shape, num_steps = (3, 22), 3
    tokens = rng.integers(0, 9, shape).astype(np.int32)
    features = Features(
        rng.normal(size=(*shape, 3, 4)), rng.normal(size=(*shape, 4)), tokens, rng.normal(size=shape)
    )  # fmt: skip
    rows = np.sort(np.stack([rng.permutation(22)[:9] for _ in range(3)]), axis=1).astype(np.int32)
    rows[1, 5:] = 22
    host = Example(Batch(tokens, tokens > 2, tokens, tokens), features, ChosenRows(rows))
    laid, cut = share(host, 4, num_steps)
    split, rows_BR = laid.chosen.shared, laid.chosen.rows_BR
    length = laid.batch.tokens_BT.shape[1]
    assert length == 24  # a multiple of four
    assert all(getattr(laid.batch, f.name).shape == (3, length) for f in dataclasses.fields(laid.batch))
    assert laid.features.last_BTE is None
    assert rows_BR.shape[1] % 4 == 0
    # What is cut: the taps, and what the rows bring with them.
    assert jax.tree.leaves(cut.chosen) == [True] * 4
    assert not any(jax.tree.leaves(cut.batch))
    assert jax.tree.leaves(cut.features) == [True, False, False]
    np.testing.assert_array_equal(laid.features.taps_BTKE[:, :22], features.taps_BTKE)
    for b, row in enumerate(rows_BR):
        assert sorted(row[split.owned_BR[b]].tolist()) == rows[b][rows[b] < 22].tolist()
        for i, at in enumerate(row):
            if at < 22:
                np.testing.assert_array_equal(split.taps_BRKE[b, i], features.taps_BTKE[b, at])
                np.testing.assert_array_equal(split.last_BRE[b, i], features.last_BTE[b, at + 1] if at < 21 else 0)
            else:
                assert not split.owned_BR[b, i]
