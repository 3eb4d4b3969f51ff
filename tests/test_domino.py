"""Domino: the walk as decoding, the head's view of the text, the schedule, the scalar accuracies."""

import dataclasses

import dflash
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_walk import assert_samples_are_the_targets, assert_the_walk_is_decoding, decode, packed_and_apart
from closeness import assert_close
from flax import nnx
from test_dflash import models as models
from test_rejection import V

from flaxdraft.algorithms.domino.algorithm import Algorithm
from flaxdraft.algorithms.domino.drafts import mla, qwen3
from flaxdraft.algorithms.domino.settings import Settings as DominoSettings
from flaxdraft.errors import InputError
from flaxdraft.evaluate.walk import Part, combine
from flaxdraft.interfaces import Draw

SHIFTED = {"shift_label": True, "pure_draft_prefix_len": 1}
PLAIN = {"shift_label": False, "pure_draft_prefix_len": 0}


def make_algorithm(**settings) -> Algorithm:
    return Algorithm(DominoSettings(**settings))


@pytest.mark.parametrize(
    ("settings", "module"),
    [
        (SHIFTED, qwen3),
        pytest.param(PLAIN, qwen3, marks=pytest.mark.slow),
        pytest.param({"shift_label": True, "pure_draft_prefix_len": 0}, mla, marks=pytest.mark.slow),
    ],
    ids=["shifted", "plain", "mla"],
)
def test_the_walk_is_greedy_decoding(settings, module, models, monkeypatch):
    """And what the head says changes its passes."""
    target, make = models
    algorithm, draft = make_algorithm(block_size=4, **settings), make(module, block_size=4, **settings)
    forced = assert_the_walk_is_decoding(target, draft, algorithm, monkeypatch)
    silent = nnx.clone(draft)
    silent.correction.lm_head[...] = jnp.zeros_like(silent.correction.lm_head[...])
    assert [one.yields for one in decode(target, silent, algorithm)] != forced.yields


@pytest.mark.slow
def test_sampled_answers_are_distributed_as_the_targets(models):
    """The head's distribution of each slot is that after the tokens which were drawn before it."""
    target, make = models
    settings = SHIFTED | {"block_size": 4, "pure_draft_prefix_len": 0}
    draft = make(qwen3, **settings)
    draft.correction.lm_head[...] *= 0.5  # so that it is not too sure
    assert_samples_are_the_targets(target, draft, make_algorithm(**settings), rarest=0.01)


@pytest.fixture(scope="module")
def pair(models):
    """An algorithm and a draft, whose sums are compiled once a shape."""
    algorithm, draft = make_algorithm(block_size=4, base_steps=10), models[1](qwen3, block_size=4)
    return algorithm, draft, jax.jit(lambda example, step: algorithm.sums(draft, example, step))


def test_packed_documents_are_as_separate_ones(pair):
    _, _, sums = pair
    got, want = (sums(example, jnp.int32(5)) for example in packed_and_apart())
    assert_close(got, want, rtol=2e-6)
    assert int(got.blocks.num_blocks) == 5 + 3


def test_no_slot_reads_what_it_predicts(models):
    """Nor what comes after: a token changes the latents of slots behind the one that predicts it alone."""
    for settings, first in ((SHIFTED, 0), (PLAIN, 1)):
        draft = models[1](qwen3, block_size=4, **settings | {"pure_draft_prefix_len": 0})
        hidden = jnp.ones((1, 4, 8))
        base = draft.latents(hidden, jnp.zeros((1, 4), jnp.int32))
        assert np.any(np.asarray(base[0]), axis=1).tolist() == [slot >= first for slot in range(4)]
        for place in range(4):
            changed = draft.latents(hidden, jnp.zeros((1, 4), jnp.int32).at[0, place].set(3))
            moved = np.any(np.asarray(changed != base)[0], axis=1)
            assert moved.tolist() == [slot >= place + first for slot in range(4)]


def test_the_base_loss_fades_with_the_step(pair):
    algorithm, draft, sums = pair
    example = dflash.example_of(draft.config)
    example = dataclasses.replace(example, chosen=algorithm.choose(example.batch, 12, Draw(0, 0, 0)))
    losses = [float(sums(example, jnp.int32(step)).blocks.loss) for step in (0, 5, 10, 11)]
    assert_close(losses[1], (losses[0] + losses[2]) / 2, rtol=1e-5)
    assert losses[0] != losses[2] == losses[3]
    assert int(algorithm.next_carry(algorithm.first_carry(), None, jnp.int32(6))) == 7  # wherever a run goes on


def test_scalar_accuracies_are_of_sums(pair):
    """Of ragged parts too, as of all at once: no means of means."""
    algorithm, draft, _ = pair
    evaluation, example = algorithm.drafting(3), dflash.example_of(draft.config, num_rows=3)
    long = np.arange(12)[None] >= np.array([[2], [9], [10]])
    example = dataclasses.replace(example, batch=dataclasses.replace(example.batch, assistant_BT=jnp.asarray(long)))
    chosen = evaluation.choose(example.batch, 12, Draw(0, 0, 0))
    example = dataclasses.replace(example, chosen=jax.tree.map(jnp.asarray, chosen))
    accepted = jax.jit(lambda example: evaluation.accepted(draft, example)[0])
    of = lambda rows: jax.device_get(accepted(jax.tree.map(lambda x: x[rows], example)))  # noqa: E731
    parts, whole = [of(slice(i, i + 1)) for i in range(3)], of(slice(None))
    joined = combine(Part(one, np.int64(0), np.int64(0)) for one in parts).sums
    for name in ("token_accuracy", "base_token_accuracy", "teacher_forced_length", "base_teacher_forced_length"):
        each = [one.figures()[name] for one in parts]
        assert joined.figures()[name] == whole.figures()[name]
        assert abs(np.mean(each) - whole.figures()[name]) > 1e-3, (name, each)
    blocks = whole.blocks
    assert whole.figures()["token_accuracy"] == blocks.hit_Q.sum() / blocks.asked_Q.sum()


def test_a_head_that_corrects_nothing_is_refused(models):
    with pytest.raises(InputError, match=r"pure_draft_prefix_len: found 4, expected at least 0 and less than block_s"):
        models[1](qwen3, block_size=4, pure_draft_prefix_len=4)


def test_a_fresh_head_says_nothing(models):
    """Training begins as DFlash's does."""
    target, _ = models
    fresh = dflash.make_draft(qwen3.Config(**qwen3.Config.for_target(target.config, V), block_size=4), target)
    latents = fresh.latents(jnp.ones((1, 4, 8)), jnp.zeros((1, 4), jnp.int32))
    assert latents.any()
    assert not fresh.correction.logits(latents).any()
