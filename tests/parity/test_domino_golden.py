"""Domino against one forward and backward pass of the PyTorch reference: labels shifted and not, prefixes of one and of
none. Needs no PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_golden import draft_of, example_of, golden
from closeness import assert_close
from flax import nnx

from flaxdraft.algorithms.domino.algorithm import Algorithm
from flaxdraft.algorithms.domino.drafts import qwen3
from flaxdraft.algorithms.domino.schedule import base_share
from flaxdraft.algorithms.domino.settings import Settings
from flaxdraft.config import TrainConfig
from flaxdraft.files.name_tables import state_to_torch
from flaxdraft.nn.layers import Frozen
from flaxdraft.ops.rows import take_rows

pytestmark = pytest.mark.numeric
NAMES = ("domino_a", "domino_a2")


def algorithm_of(meta) -> Algorithm:
    """With a schedule whose step k of 10 has the share 1 - k / 10."""
    nested = meta["options"]["dflash_config"]
    return Algorithm(Settings(
        block_size=meta["options"]["block"], decay_gamma=meta["options"]["gamma"], base_steps=10, loss_chunk=5,
        shift_label=nested["shift_label"], pure_draft_prefix_len=nested["pure_draft_prefix_len"],
    ))  # fmt: skip


@functools.cache
def passed(name):
    """The golden; what is known of each slot; and of each share of the base loss: its sums and gradients."""
    of, algorithm = golden(name), algorithm_of(golden(name).meta)
    example, draft = example_of(of), draft_of(qwen3, of)
    graphdef, params, frozen = nnx.split(draft, nnx.Param, Frozen)

    @jax.jit
    def run(params, step):
        def loss(params):
            sums = algorithm.sums(nnx.merge(graphdef, params, frozen), example, step)
            return jnp.divide(*sums.terms()), sums

        (value, sums), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return value, sums, gradients

    own = round(of.meta["options"]["lambda_base"], 6)
    found = {}
    for share in (own, 0.0, 1.0):
        value, sums, gradients = run(params, jnp.int32(round(10 * (1 - share))))
        found[share] = value, sums, state_to_torch(gradients, qwen3.name_table(draft.config), np.float32)

    @jax.jit
    def states(params):
        draft, anchor_BA = nnx.merge(graphdef, params, frozen), example.chosen.anchor_BA
        text = algorithm.read(draft, example)
        hidden = algorithm.states(draft, example.batch, text, anchor_BA)
        slots_BAS = anchor_BA[:, :, None] + jnp.arange(draft.config.block_size)[None, None]
        latents = draft.latents(hidden, take_rows(example.batch.tokens_BT, slots_BAS.reshape(hidden.shape[:2])))
        scores = algorithm.scored(draft, draft.head_VD(), example, text, anchor_BA)
        return hidden, draft.correction.logits(latents[:1, : draft.config.block_size])[0], scores

    return of, states(params), own, found


@pytest.mark.parametrize("name", NAMES)
def test_every_slot_is_the_references(name):
    of, (hidden, correction_SV, scores), _, _ = passed(name)
    t, keep = of.tensors, of.tensors["sample.keep"] > 0
    asked = t["mid.weight_mask"] > 0
    assert_close(np.asarray(hidden)[np.repeat(keep, 4, axis=1)], t["out.hidden"][np.repeat(keep, 4, axis=1)], rtol=1e-5)
    np.testing.assert_array_equal(scores.asked_BAS, asked)
    assert_close(scores.loss_BAS, np.where(asked, t["out.ce_final"], 0), rtol=1e-5)
    for got, argmax in ((scores.hit_BAS, "out.argmax_final"), (scores.base_hit_BAS, "out.argmax_base")):
        np.testing.assert_array_equal(got, asked & (t[argmax] == t["mid.target_ids"]))
    want = t["out.final_minus_base_logits_block0"][0]
    assert_close(correction_SV, want, rtol=1e-5)
    np.testing.assert_array_equal(np.any(correction_SV, axis=1), np.any(want, axis=1))


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_figures(name):
    of, _, _, found = passed(name)
    for share, (value, sums, _) in found.items():
        want = of.meta["results"][f"lambda_{share}"]
        assert_close(float(value), want["loss"], rtol=1e-5)
        figures = sums.figures()
        for ours, theirs in (
            ("token_accuracy", "accuracy"), ("base_token_accuracy", "base_accuracy"),
            ("teacher_forced_length", "accept_len"), ("base_teacher_forced_length", "base_accept_len"),
        ):  # fmt: skip
            assert_close(figures[ours], want[theirs], rtol=1e-6)
        assert int(sums.blocks.asked_Q.sum()) == want["accuracy_denom"]


@pytest.mark.parametrize("name", NAMES)
def test_every_gradient(name):
    of, _, own, found = passed(name)
    for share, prefix in ((own, "g."), (0.0, "g_lambda_0.0."), (1.0, "g_lambda_1.0.")):
        wanted, got = of.of(prefix), found[share][2]
        assert len(wanted) in (3, len(got))
        assert_close({key: got[key] for key in wanted}, wanted, rtol=1e-4, of="norm")


def test_the_schedule_is_the_references():
    for row in golden("domino_a").meta["results"]["schedule"]:
        settings = Settings(base_start=row["start"], base_ratio=row["ratio"])
        settings = settings.for_run(TrainConfig(num_steps=row["total"]))
        assert_close(float(base_share(settings, jnp.int32(row["step"]))), row["lambda"], rtol=1e-6)
    assert float(base_share(Settings(), jnp.int32(0))) == 0  # the number of steps is not known
