"""Drafts of a wrong convention are caught by decoding: what the right one gains is lost."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from agreeing import VOCAB, D, V, make_draft, make_target, prompts
from flax import nnx

from flaxdraft.data.generation import answer_greedily
from flaxdraft.evaluate.acceptance import accept_length
from flaxdraft.evaluate.decoding import Settings, decode
from flaxdraft.interfaces import VocabMap

PROMPTS, LIMIT, STOP = prompts(48), 24, 7


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture(scope="module")
def rows(target):
    return answer_greedily(target, PROMPTS, LIMIT, STOP, len(PROMPTS), lambda num: None)


def gained(target, rows, draft):
    """Accept length; the answers are the target's own, whatever the draft is."""
    decoded = decode(target, nnx.split(draft), PROMPTS, Settings(LIMIT, 4, (STOP,)))
    assert [one.tokens for one in decoded] == [row.tokens[row.num_prompt :].tolist() for row in rows]
    return accept_length([one.yields for one in decoded])


def rope_base(name, target, rows):
    rope = make_draft(name, target).config.rope
    return make_draft(name, target, rope=dataclasses.replace(rope, rope_theta=100.0))


def norm_swapped(name, target, rows):
    """Trained on states before the final norm, served as if they were carried behind it."""
    return make_draft(name, target, norm_output=True)


def identity_map(name, target, rows):
    return make_draft(name, target, vocab=VocabMap(np.arange(VOCAB.draft_vocab_size), V))


def unshifted(name, target, rows):
    """Row p predicts x_{p+1}: features, tokens and labels of one place. It is right by its own measure."""
    draft = make_draft(name, target)
    draft.self_attn.o_proj.kernel[...] = jnp.zeros_like(draft.self_attn.o_proj.kernel[...])
    draft.fc.kernel[...] = draft.fc.kernel[...].at[2 * D :].set(jnp.eye(D))
    taps = np.concatenate([row.features.taps_BT3E[row.num_prompt : -1] for row in rows])
    following = np.concatenate([row.tokens[row.num_prompt + 1 :] for row in rows])
    said = draft.target_ids[...][jnp.argmax(draft.logits(draft.project(taps[None])), axis=-1)][0]
    assert np.mean(said == following) > 0.6
    return draft


@pytest.mark.parametrize("plant", [rope_base, norm_swapped, identity_map, unshifted])
@pytest.mark.parametrize("name", ["llama", pytest.param("mla", marks=pytest.mark.slow)])
def test_a_wrong_convention_loses_what_the_right_one_gains(target, rows, name, plant):
    right = gained(target, rows, make_draft(name, target))
    assert right > 2.5
    assert gained(target, rows, plant(name, target, rows)) - 1 < 0.5 * (right - 1)
