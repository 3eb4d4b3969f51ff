"""Draft vocabularies: the map, its three tables, and how it is chosen."""

import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close

from flaxdraft.data.draft_vocabulary import choose_vocab, coverage, coverage_by_size, describe_sizes, source_of
from flaxdraft.errors import InputError
from flaxdraft.interfaces import VocabMap
from flaxdraft.train.checkpoint import Checkpoints, abstract_like
from flaxdraft.train.resume import Resume, begin
from flaxdraft.train.state import SCHEMA

V = 50
MAPS = {
    "some": np.array([0, 3, 4, 17, 49]),
    "one": np.array([7]),
    "all": np.arange(V),
    "narrow integers": np.array([1, 2, 40], np.int8),
}


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([1, 1, 2]), "ascend strictly, found 1 then 1 at entry 0"),
        (np.array([0, 5, 4]), "ascend strictly, found 5 then 4 at entry 1"),
        (np.array([-1, 3]), r"ids -1..3 leave the target vocabulary 0..49"),
        (np.array([3, V]), r"ids 3..50 leave the target vocabulary 0..49"),
        (np.array([], np.int64), r"expected a non-empty integer vector, found int64\(0,\)"),
        (np.array([1.0, 2.0]), "expected a non-empty integer vector, found float64"),
        (np.array([[1, 2]]), r"expected a non-empty integer vector, found int64\(1, 2\)"),
    ],
)
def test_a_map_that_is_none_is_refused(ids, message):
    with pytest.raises(InputError, match=f"vocabulary map: .*{message}"):
        VocabMap(ids, V)


@pytest.mark.parametrize("ids", MAPS.values(), ids=MAPS)
def test_the_tables_agree(ids):
    vocab = VocabMap(ids, V)
    d2t, t2d, to_draft = vocab.d2t(), vocab.t2d(), vocab.to_draft()
    num = vocab.draft_vocab_size
    assert (num, d2t.shape, t2d.shape, to_draft.shape) == (len(ids), (num,), (V,), (V,))
    assert (d2t.dtype, t2d.dtype, to_draft.dtype) == (np.int64, np.bool_, np.int32)
    for i in range(num):  # the servers' convention: offsets
        assert i + d2t[i] == ids[i]
        assert to_draft[ids[i]] == i
    np.testing.assert_array_equal(np.flatnonzero(t2d), ids)
    np.testing.assert_array_equal(to_draft >= 0, t2d)
    assert set(to_draft[~t2d].tolist()) <= {-1}


@pytest.mark.parametrize("ids", MAPS.values(), ids=MAPS)
def test_offsets_give_the_map_back(ids):
    back = VocabMap.from_offsets(VocabMap(ids, V).d2t(), V)
    np.testing.assert_array_equal(back.target_ids_W, ids)
    assert back.vocab_size == V


def test_offsets_that_are_absolute_ids_are_noticed():
    with pytest.raises(InputError, match="leave the target vocabulary"):
        VocabMap.from_offsets(np.array([0, 3, 4, 17, 49]), V)


def test_the_most_frequent_tokens_are_chosen_in_ascending_order():
    counts = np.zeros(V, np.int64)
    counts[[30, 5, 41, 12]] = [9, 8, 7, 6]
    assert choose_vocab(counts, [], 3).target_ids_W.tolist() == [5, 30, 41]
    assert coverage(counts, choose_vocab(counts, [], 3)) == 24 / 30


def test_special_tokens_are_always_in():
    counts = np.arange(V)  # the specials are the rarest
    vocab = choose_vocab(counts, [0, 2, 1], 5)
    assert vocab.target_ids_W.tolist() == [0, 1, 2, 48, 49]
    assert choose_vocab(counts, [2, 0], 2).target_ids_W.tolist() == [0, 2]


def test_ties_and_spare_places_go_to_the_lowest_ids():
    counts = np.zeros(V, np.int64)
    counts[[20, 30, 40]] = 5
    assert choose_vocab(counts, [], 2).target_ids_W.tolist() == [20, 30]
    assert choose_vocab(counts, [49], 6).target_ids_W.tolist() == [0, 1, 20, 30, 40, 49]


def test_choosing_changes_no_counts():
    counts = np.ones(V, np.int64)
    choose_vocab(counts, [3], 10)
    assert (counts == 1).all()


def test_the_whole_vocabulary_may_be_chosen():
    assert choose_vocab(np.zeros(V, np.int64), [1], V).target_ids_W.tolist() == list(range(V))


@pytest.mark.parametrize(("size", "special"), [(V + 1, [0]), (1, [0, 1]), (0, [0])])
def test_impossible_sizes_are_refused(size, special):
    with pytest.raises(InputError, match=rf"draft.draft_vocab_size: found {size}, expected {len(special)} .* to 50 "):
        choose_vocab(np.zeros(V, np.int64), special, size)


def test_coverage_of_nothing_is_zero():
    assert coverage(np.zeros(V, np.int64), VocabMap(np.arange(4), V)) == 0.0


def test_coverage_of_several_sizes():
    """What each size would hold, forced tokens first; no size beyond the one that holds everything."""
    counts = np.zeros(5000, np.int64)
    counts[:600] = np.arange(600, 0, -1)
    forced = [4999, 4998]
    found = coverage_by_size(counts, forced)
    assert list(found) == [256, 512, 1024]
    for size, share in found.items():
        assert_close(share, coverage(counts, choose_vocab(counts, forced, size)), ulp=4)
    assert found[1024] == 1.0
    assert describe_sizes(counts, forced).endswith(f"256 {found[256]:.1%}, 512 {found[512]:.1%}, 1024 100.0%")
    assert list(coverage_by_size(counts, range(300))) == [512, 1024]  # a size must hold the forced ones
    assert coverage_by_size(np.eye(1, 300, dtype=np.int64)[0], []) == {256: 1.0}


def test_a_map_knows_what_it_was_chosen_from():
    counts = np.ones(V, np.int64)
    sources = {source_of(tokenizer, data) for tokenizer in ("a", "b") for data in ("a", "b")}
    assert len(sources) == 4
    assert choose_vocab(counts, [], 3, "from here").source == "from here"
    assert choose_vocab(counts, [], 3).source == ""


def test_a_checkpoint_keeps_where_its_map_is_from(tmp_path):
    """The same ids, chosen from other data: refused."""
    arrays = {"state": {"x": jnp.arange(3.0)}, "counters": {"tokens": jnp.zeros(2, jnp.int32)}}
    mine, others = (VocabMap(np.array([1, 4, 9]), V, source) for source in ("these answers", "others"))
    record = {"schema": SCHEMA, "score": None, "inputs": {}, "vocab": {"size": 3, "source": mine.source}}
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(2, arrays, mine, record)
    with Checkpoints(tmp_path / "c") as checkpoints:
        begun = begin(checkpoints, Resume("auto", {}, mine), abstract_like(arrays))
        np.testing.assert_array_equal(begun.arrays["state"]["x"], arrays["state"]["x"])
        with pytest.raises(InputError, match=r"another vocabulary map \(3 tokens, chosen from 'these answers'\)"):
            begin(checkpoints, Resume("auto", {}, others), abstract_like(arrays))
