"""DSpark: the walk as decoding, with and without a cut by confidence; what the teacher is; the temperatures."""

import dataclasses

import dflash
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_walk import assert_samples_are_the_targets, assert_the_walk_is_decoding, decode, packed_and_apart, walk
from closeness import assert_close
from test_dflash import models as models
from test_rejection import V

from flaxdraft.algorithms.dspark.algorithm import Algorithm
from flaxdraft.algorithms.dspark.drafts import mla, qwen3
from flaxdraft.algorithms.dspark.settings import Settings as DSparkSettings
from flaxdraft.algorithms.dspark.sums import TEMPERATURES, best_temperatures, surprise
from flaxdraft.errors import InputError
from flaxdraft.ops import rejection


def make_algorithm(**settings) -> Algorithm:
    return Algorithm(DSparkSettings(**settings))


@pytest.mark.parametrize(
    ("threshold", "fields", "module"),
    [
        (0.15, {}, qwen3),
        pytest.param(0.0, {"markov_head_type": "rnn"}, qwen3, marks=pytest.mark.slow),
        pytest.param(0.0, {"markov_head_type": "gated", "enable_confidence_head": False}, mla, marks=pytest.mark.slow),
    ],
    ids=["cut", "rnn", "gated, mla"],
)
def test_the_walk_is_greedy_decoding(threshold, fields, module, models, monkeypatch):
    target, make = models
    draft = make(module, block_size=3, **fields)
    algorithm = make_algorithm(block_size=3, confidence_threshold=threshold)
    forced = assert_the_walk_is_decoding(target, draft, algorithm, monkeypatch)
    assert forced.figures()["teacher_accuracy"] == 1
    if threshold:  # which cuts some of what would have been accepted
        uncut = decode(target, draft, make_algorithm(block_size=3))
        assert sum(map(len, forced.yields)) > sum(len(one.yields) for one in uncut)


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.0, 0.15])
def test_sampled_answers_are_distributed_as_the_targets(threshold, models):
    target, make = models
    draft, algorithm = make(qwen3, block_size=4), make_algorithm(block_size=4, confidence_threshold=threshold)
    assert_samples_are_the_targets(target, draft, algorithm)


def test_what_was_not_drafted_is_neither_accepted_nor_subtracted():
    """A row that proposes nothing samples the target's distribution; others as if their chain ended earlier."""
    num, rng = 4000, np.random.default_rng(0)
    p_VT, q_VQ = (jnp.asarray(rng.dirichlet(np.ones(4), n), jnp.float32) for n in (3, 2))
    keys = jax.random.split(jax.random.key(0), num)
    tile = lambda x: jnp.tile(x[None], (num, 1, 1))  # noqa: E731
    chain = jnp.zeros((num, 2), jnp.int32)
    accepted, following = rejection.verify(
        tile(p_VT), tile(q_VQ), chain, jnp.arange(4), keys, jnp.zeros(num, jnp.int32)
    )
    assert not accepted.any()
    assert_close(np.bincount(following, minlength=4) / num, np.asarray(p_VT[0], np.float64), rtol=0.05)
    some = rejection.verify(tile(p_VT), tile(q_VQ), chain, jnp.arange(4), keys, jnp.full(num, 1))[0]
    whole = rejection.verify(tile(p_VT), tile(q_VQ), chain, jnp.arange(4), keys)[0]
    np.testing.assert_array_equal(some, jnp.minimum(whole, 1))


def last(change):
    """A planted fault in the teacher's states of an answer."""
    return lambda row: dataclasses.replace(
        row, features=dataclasses.replace(row.features, last_BTE=change(row.features.last_BTE))
    )


@pytest.mark.parametrize(
    "change",
    [lambda x: np.roll(x, 1, axis=0), lambda x: x * np.linspace(-3, 4, 8, dtype=np.float32)],
    ids=["of another row", "not normed"],
)
def test_a_wrong_teacher_is_seen(change, models):
    """The target's likeliest token is then not the one that it said."""
    target, make = models
    draft, algorithm = make(qwen3, block_size=3), make_algorithm(block_size=3)
    alone = decode(target)
    assert walk(target, draft, algorithm, alone).figures()["teacher_accuracy"] == 1
    assert walk(target, draft, algorithm, alone, last(change)).figures()["teacher_accuracy"] < 0.9


def test_packed_documents_are_as_separate_ones(models):
    draft, algorithm = models[1](qwen3, block_size=4, markov_head_type="rnn"), make_algorithm(block_size=4)
    sums = jax.jit(lambda example: algorithm.sums(draft, example, ()))
    got, want = map(sums, packed_and_apart())
    assert_close(got, want, rtol=2e-6)
    assert int(got.blocks.num_blocks) == 5 + 3


def test_temperatures_are_those_that_surprise_least():
    """Of logits that are sharper than what happens, each slot where those before were right; 1 where nothing is asked.
    Elsewhere a slot's logit means nothing."""
    rng, num = np.random.default_rng(0), 60_000
    honest = rng.normal(size=(1, num, 3)) * 1.5
    hit = rng.random(honest.shape) < 1 / (1 + np.exp(-honest))
    hit[:, :, 1] = np.where(hit[:, :, 0], hit[:, :, 1], rng.random((1, num)) < 0.5)
    asked = np.ones_like(hit)
    asked[:, :, 2] = False
    found = surprise(*(jnp.asarray(x) for x in ((honest * [4.0, 0.5, 4.0]).astype(np.float32), asked, hit)))
    assert found.shape == (len(TEMPERATURES), 3)
    # The neighbours on the grid are a twelfth apart.
    assert_close(np.array(best_temperatures(np.asarray(found))), np.array([4.0, 0.5, 1.0]), rtol=0.1, of="each")


def test_a_fresh_head_says_nothing_and_slots_are_its_own(models):
    target, make = models
    fresh = dflash.make_draft(qwen3.Config(**qwen3.Config.for_target(target.config, V), block_size=4), target)
    latents = fresh.markov.latents(fresh.markov.embed(jnp.zeros((1, 4), jnp.int32)), jnp.ones((1, 4, 8)), 4)
    assert latents.any()
    assert not fresh.markov.logits(latents).any()
    with pytest.raises(InputError, match="slot of dspark predicts as well"):
        make(qwen3, block_size=4, sample_from_anchor=False)
    with pytest.raises(InputError, match=f"draft_vocab_size: found 3, expected the target's {V}: the Markov head"):
        make(qwen3, block_size=4, draft_vocab_size=3)
    with pytest.raises(InputError, match="markov_head_type: found 'best', expected one of vanilla, gated, rnn"):
        make(qwen3, block_size=4, markov_head_type="best")
