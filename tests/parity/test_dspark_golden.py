"""DSpark against one forward and backward pass of the PyTorch reference, with each Markov head. Needs no PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_golden import draft_of, example_of, golden
from closeness import assert_close
from flax import nnx

from flaxdraft.algorithms.dspark.algorithm import Algorithm
from flaxdraft.algorithms.dspark.drafts import qwen3
from flaxdraft.algorithms.dspark.settings import Settings
from flaxdraft.files.name_tables import state_to_torch
from flaxdraft.nn.layers import Frozen
from flaxdraft.ops.rows import take_rows

pytestmark = pytest.mark.numeric
NAMES = ("dspark_a", "dspark_a_gated", "dspark_a_rnn")


@functools.cache
def passed(name):
    """The golden, hidden states, the correction of the first block, what is known of slots, the sums, gradients."""
    of = golden(name)
    o, example, draft = of.meta["options"], example_of(of), draft_of(qwen3, of)
    algorithm = Algorithm(Settings(block_size=o["block"], decay_gamma=o["gamma"], loss_chunk=5, ce_alpha=o["ce"],
                                   l1_alpha=o["l1"], confidence_alpha=o["conf"]))  # fmt: skip
    graphdef, params, frozen = nnx.split(draft, nnx.Param, Frozen)

    @jax.jit
    def run(params):
        def loss(params):
            sums = algorithm.sums(nnx.merge(graphdef, params, frozen), example, ())
            return jnp.divide(*sums.terms()), sums

        (value, sums), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        draft, anchor_BA = nnx.merge(graphdef, params, frozen), example.chosen.anchor_BA
        text = algorithm.read(draft, example)
        hidden = algorithm.states(draft, example.batch, text, anchor_BA)
        rows = (anchor_BA[:, :, None] + jnp.arange(o["block"])[None, None]).reshape(hidden.shape[:2])
        before = draft.markov.embed(take_rows(example.batch.tokens_BT, rows))
        latents = draft.markov.latents(before, hidden, o["block"])
        scores = algorithm.scored(draft, draft.head_VD(), example, text, anchor_BA)
        return hidden, draft.markov.logits(latents[:1, : o["block"]])[0], scores, value, sums, gradients

    *found, gradients = run(params)
    return of, *found, state_to_torch(gradients, qwen3.name_table(draft.config), np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_every_slot_is_the_references(name):
    of, hidden, correction_SV, scores, *_ = passed(name)
    t, keep = of.tensors, np.repeat(of.tensors["sample.keep"] > 0, 4, axis=1)
    asked = t["mid.eval_mask"] > 0
    assert_close(np.asarray(hidden)[keep], t["out.hidden"][keep], rtol=1e-5)
    assert_close(correction_SV, t["out.final_minus_base_logits_block0"][0], rtol=1e-5)
    np.testing.assert_array_equal(scores.asked_BAS, asked)
    assert_close(scores.weight_BAS, t["mid.loss_weights"], rtol=1e-6)
    assert_close(scores.loss_BAS, np.where(asked, t["out.ce"], 0), rtol=1e-5)
    assert_close(scores.distance_BAS, np.where(asked, t["out.l1"], 0), rtol=1e-5)
    confidence = np.where(asked, scores.confidence_BAS, 0)
    assert_close(confidence, np.where(asked, t["out.confidence_logit"], 0), rtol=1e-5)
    np.testing.assert_array_equal(scores.hit_BAS, asked & (t["out.argmax"] == t["mid.target_ids"]))


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_figures(name):
    of, _, _, _, value, sums, _ = passed(name)
    want, figures = of.meta["results"], sums.figures()
    assert_close(float(value), want["loss"], rtol=1e-5)
    share = lambda key: want[key]["num"] / want[key]["den"]  # noqa: E731
    for ours, theirs in (
        ("token_accuracy", "acc"), ("text_loss", "ce_loss"), ("distance_loss", "l1_loss"),
        ("confidence_loss", "confidence_loss"), ("confidence_error", "confidence_abs_error"),
        ("expected_length", "tau_probabilistic"),
    ):  # fmt: skip
        assert_close(figures[ours], share(theirs), rtol=1e-5)
    by_slot = want["accuracy_position"]
    assert_close(np.array(figures["accuracy"]), np.divide(by_slot["num"], by_slot["den"]), rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_gradient(name):
    of, *_, got = passed(name)
    assert_close(got, of.of("g."), rtol=1e-4, of="norm")
