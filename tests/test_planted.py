"""Drafts of a wrong convention are caught by decoding: what the right one gains is lost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from agreeing import VOCAB, D, V, make_draft, make_target, prompts, ready
from eagle3 import algorithm as make_algorithm
from flax import nnx

from flaxdraft.algorithms.eagle3.drafts import llama
from flaxdraft.data.answers import answer_greedily
from flaxdraft.data.documents import as_document
from flaxdraft.data.pipeline import collate
from flaxdraft.decode.decoding import Decoding, Settings
from flaxdraft.devices.sharding import Sharding
from flaxdraft.evaluate.results import acceptance
from flaxdraft.evaluate.walk import accept_length
from flaxdraft.interfaces import Draw, VocabMap
from flaxdraft.nn.precision import Precision
from flaxdraft.train.state import split_draft

PROMPTS, LIMIT, STOP, CHAIN = prompts(48), 24, 7, 4


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture(scope="module")
def rows(target):
    return answer_greedily(target, PROMPTS, LIMIT, [STOP], len(PROMPTS), lambda num: None)


def gained(target, rows, draft):
    """Accept length; the answers are the target's own, whatever the draft is."""
    decoded = Decoding(target, ready(draft), PROMPTS, Settings(LIMIT, CHAIN, (STOP,))).finish()
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


def unshifted_labels(name, target, rows):
    """Row p predicts x_{p+1}: features, tokens and labels of one place. It is right by its own measure."""
    draft = make_draft(name, target)
    draft.self_attn.o_proj.kernel[...] = jnp.zeros_like(draft.self_attn.o_proj.kernel[...])
    draft.fc.kernel[...] = draft.fc.kernel[...].at[2 * D :].set(jnp.eye(D))
    taps = np.concatenate([row.features.taps_BTKE[row.num_prompt : -1] for row in rows])
    following = np.concatenate([row.tokens[row.num_prompt + 1 :] for row in rows])
    said = draft.target_ids[...][jnp.argmax(draft.logits(draft.project(taps[None])), axis=-1)][0]
    assert np.mean(said == following) > 0.6
    return draft


@pytest.mark.parametrize("plant", [rope_base, norm_swapped, identity_map, unshifted_labels])
@pytest.mark.parametrize("name", ["llama", pytest.param("mla", marks=(pytest.mark.slow, pytest.mark.exhaustive))])
def test_a_wrong_convention_loses_what_the_right_one_gains(target, rows, name, plant):
    right = gained(target, rows, make_draft(name, target))
    assert right > 2.5
    assert gained(target, rows, plant(name, target, rows)) - 1 < 0.5 * (right - 1)


TEMPLATE = [3, 9, 20, 33]  # the end of every prompt, DISTANCE tokens long: what stands behind an answer's first token


def templated(seed):
    """Prompts as a chat template leaves them: its tokens stand nowhere else."""
    bodies = prompts(len(PROMPTS), seed=seed, longest=16)
    return [[token for token in body if token not in TEMPLATE] + TEMPLATE for body in bodies]


@pytest.fixture(scope="module")
def train(target):
    """A fresh draft after a hundred steps over documents, and what an evaluation says of it on held-out prompts."""
    config, algorithm, optimizer = make_draft("llama", target).config, make_algorithm(1), optax.adam(1e-2)
    head_WE = target.head()[VOCAB.target_ids_W]

    def fresh(seed):
        more = {"precision": Precision(), "sharding": Sharding.none(), "rngs": nnx.Rngs(seed)}
        return split_draft(llama.make(config, VOCAB, target, **more))

    graphdef, _, frozen = fresh(0)

    @jax.jit
    def trained(params, example):
        def loss(params):
            draft = nnx.merge(graphdef, params, frozen)
            numerator, count = algorithm.sums(draft, example, algorithm.first_carry()).terms()
            return numerator / count

        def step(_, carry):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 100, step, (params, optimizer.init(params)))[0]

    def run(documents, seed):
        rows = ([document] for document in documents)
        host = collate(rows, documents[0].features, len(PROMPTS), 32, 12, algorithm, Draw(0, 0, 0))
        params = trained(fresh(seed)[1], dataclasses.replace(host, teacher=head_WE))
        parts = ready(nnx.merge(graphdef, params, frozen))
        decoded = Decoding(target, parts, templated(1000), Settings(LIMIT, CHAIN, (STOP,))).finish()
        return acceptance([one.yields for one in decoded], CHAIN)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_an_unshifted_mask_shows_in_the_first_pass_of_answers(target, train, seed):
    """Two drafts trained on the same answers; the other's mask lies one token late of its labels. Tokens and features
    are right, so it learns all but the row before an answer, which nothing else can teach."""
    answered = answer_greedily(target, templated(seed), 12, [STOP], len(PROMPTS), lambda num: None)
    documents = [as_document(row) for row in answered]
    late = [
        dataclasses.replace(document, assistant=document.assistant & np.roll(document.assistant, 1))
        for document in documents
    ]
    right, wrong = (train(some, seed)["first_token_accepted"] for some in (documents, late))
    assert right["first_pass"] > 0.5 > 0.1 > wrong["first_pass"]
    assert wrong["later_passes"] > 0.7 * right["later_passes"]
