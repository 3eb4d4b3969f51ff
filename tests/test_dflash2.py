"""DFlash2: the walk as decoding, what convolutions and selector see, the schedule, sampled decoding."""

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

from flaxdraft.algorithms.dflash.block_attention import Way
from flaxdraft.algorithms.dflash.draft import Places
from flaxdraft.algorithms.dflash2.algorithm import Algorithm
from flaxdraft.algorithms.dflash2.drafts import mla, qwen3
from flaxdraft.algorithms.dflash2.schedule import selector_share
from flaxdraft.algorithms.dflash2.settings import Settings as DFlash2Settings
from flaxdraft.config import TrainConfig
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Draw
from flaxdraft.train.state import split_draft


def make_algorithm(**settings) -> Algorithm:
    return Algorithm(DFlash2Settings(**settings))


@pytest.mark.parametrize("module", [qwen3, pytest.param(mla, marks=pytest.mark.slow)], ids=["qwen3", "mla"])
def test_the_walk_is_greedy_decoding(module, models, monkeypatch):
    """And what the selector says changes its passes."""
    target, make = models
    algorithm, draft = make_algorithm(block_size=4), make(module, block_size=4, selector_top_k=5)
    forced = assert_the_walk_is_decoding(target, draft, algorithm, monkeypatch)
    silent = nnx.clone(draft)
    silent.selector.lm_head[...] = jnp.zeros_like(silent.selector.lm_head[...])
    assert [one.yields for one in decode(target, silent, algorithm)] != forced.yields


@pytest.mark.slow
def test_sampled_answers_are_distributed_as_the_targets(models):
    """The draft's distribution is that over a slot's candidates, after the tokens which were drawn before it."""
    target, make = models
    draft = make(qwen3, block_size=4, selector_top_k=3)
    assert_samples_are_the_targets(target, draft, make_algorithm(block_size=4))


def test_a_slot_is_drawn_from_its_candidates_alone(models):
    draft, seen = models[1](qwen3, block_size=4, selector_top_k=3), []

    def choose(logits_BV, j):
        seen.append(jnp.isfinite(logits_BV))
        return jnp.argmax(logits_BV, axis=1), None

    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32))
    make_algorithm(block_size=4).drafter().chosen(draft, hidden, jnp.array([1, 2]), choose)
    best = np.argsort(-np.asarray(draft.logits(hidden)), axis=2)[:, :, :3]
    for j, finite in enumerate(seen):
        assert [set(np.flatnonzero(row)) for row in finite] == [set(row) for row in best[:, j].tolist()]


def test_convolutions_stay_in_their_block(models):
    """Backwards in it, as far as the kernel reaches; nothing passes from block to block."""
    draft = models[1](qwen3, block_size=4, conv_kernel_size=3)
    convolution = draft.layer_0.attention_conv
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 8)).astype(np.float32))
    base = convolution(x, lambda read: read)
    # A slot's kernel has places 0, 1, 2, on the way in and on the way out.
    for slot, touched in ((0, [0, 1, 2, 3]), (2, [2, 3]), (3, [3]), (4, [4, 5, 6, 7]), (7, [7])):
        moved = np.any(np.asarray(convolution(x.at[0, slot].add(1.0), lambda read: read) != base)[0], axis=1)
        assert np.flatnonzero(moved).tolist() == touched


def test_keys_of_the_text_pass_no_convolution(models):
    draft = models[1](qwen3, block_size=4)
    other = nnx.clone(draft)
    other.layer_0.attention_conv.base_kernel[...] += 1.0
    taps = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 3, 8)).astype(np.float32))
    texts = [one.read(taps, jnp.arange(5)[None]) for one in (draft, other)]
    jax.tree.map(np.testing.assert_array_equal, *texts)
    at = jnp.array([[5]])
    places = Places(at, jnp.zeros_like(at), at)
    states = [one(jnp.array([[3]]), texts[0], places, Way("dense")) for one in (draft, other)]
    assert np.abs(states[0] - states[1]).max() > 1e-2


@pytest.fixture(scope="module")
def pair(models):
    """An algorithm and a draft, whose sums are compiled once a shape."""
    algorithm = make_algorithm(block_size=4, selector_warmup_steps=4, selector_ramp_steps=2)
    draft = models[1](qwen3, block_size=4, selector_top_k=5)
    return algorithm, draft, jax.jit(lambda example, step: algorithm.sums(draft, example, step))


def test_packed_documents_are_as_separate_ones(pair):
    _, _, sums = pair
    got, want = (sums(example, jnp.int32(9)) for example in packed_and_apart())
    assert_close(got, want, rtol=2e-6)
    assert int(got.blocks.num_blocks) == 5 + 3


def test_the_selectors_loss_comes_with_the_step(pair):
    algorithm, draft, sums = pair
    example = dflash.example_of(draft.config)
    example = dataclasses.replace(example, chosen=algorithm.choose(example.batch, 12, Draw(0, 0, 0)))
    losses = [float(sums(example, jnp.int32(step)).blocks.loss) for step in (0, 3, 4, 5, 99)]
    assert losses[0] == losses[1] < losses[3] == losses[4]
    assert_close(losses[2], (losses[0] + losses[3]) / 2, rtol=1e-5)
    assert int(algorithm.next_carry(algorithm.first_carry(), None, jnp.int32(6))) == 7  # wherever a run goes on


def test_the_schedule_is_specforges():
    """int(total * ratio) steps of warm-up and of ramp; the first step behind the warm-up has a part already."""
    of_run = DFlash2Settings(selector_warmup_ratio=0.05, selector_ramp_ratio=0.1, selector_alpha=0.5)
    of_run = of_run.for_run(TrainConfig(num_steps=99))
    assert (of_run.selector_warmup_steps, of_run.selector_ramp_steps) == (4, 9)
    shares = [float(selector_share(of_run, jnp.int32(step))) for step in (0, 3, 4, 11, 12, 98)]
    assert_close(shares, [0.0, 0.0, 0.5 / 9, 0.5 * 8 / 9, 0.5, 0.5], rtol=1e-6)
    at_once = DFlash2Settings(selector_warmup_steps=1, selector_ramp_steps=0)
    assert [float(selector_share(at_once, jnp.int32(step))) for step in (0, 1, 2)] == [0, 1, 1]
    assert float(selector_share(DFlash2Settings(), jnp.int32(0))) == 1  # the number of steps is not known


def test_a_stopped_gradient_trains_the_selector_alone(models):
    """The layers then learn what they would without it, the selector what it would with it."""
    draft = models[1](qwen3, block_size=4, selector_top_k=5)
    example = dflash.example_of(draft.config)
    graphdef, params, frozen = split_draft(draft)

    def gradients(**settings):
        algorithm = make_algorithm(block_size=4, **settings)
        chosen = dataclasses.replace(example, chosen=algorithm.choose(example.batch, 12, Draw(0, 0, 0)))
        loss = lambda params: algorithm.sums(nnx.merge(graphdef, params, frozen), chosen, jnp.int32(0)).blocks.loss  # noqa: E731
        flat = nnx.to_flat_state(jax.jit(jax.grad(loss))(params))
        of = lambda own: {path: np.asarray(x[...]) for path, x in flat if (path[0] == "selector") is own}  # noqa: E731
        return of(False), of(True)

    coupled, stopped, without = (
        gradients(), gradients(selector_stop_gradient=True), gradients(selector_alpha=0.0)
    )  # fmt: skip
    assert_close(stopped[0], without[0], rtol=1e-5, of="norm")
    assert_close(stopped[1], coupled[1], rtol=1e-5, of="norm")
    assert np.abs(coupled[0]["fc", "kernel"] - stopped[0]["fc", "kernel"]).max() > 1e-2
    assert not any(x.any() for x in without[1].values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"conv_kernel_size": 5}, "conv_kernel_size: found 5, expected at most block_size, 4"),
        ({"conv_group_size": 3}, "conv_group_size: found 3, expected a divisor of hidden_size, 8"),
        ({"selector_top_k": V + 1}, f"selector_top_k: found {V + 1}, expected at most vocab_size, {V}"),
        ({"selector_rank": 0}, "selector_rank: found 0, expected a positive integer"),
        ({"sample_from_anchor": True}, "dflash2's slots predict the token at their own place"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(models, fields, message):
    with pytest.raises(InputError) as caught:
        models[1](qwen3, block_size=4, **fields)
    assert message in str(caught.value)


def test_a_fresh_draft_is_dflashs(models):
    """Convolutions change nothing, the selector says nothing."""
    target, _ = models
    fresh = dflash.make_draft(qwen3.Config(**qwen3.Config.for_target(target.config, V), block_size=4), target)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 8)).astype(np.float32))
    np.testing.assert_array_equal(fresh.layer_0.mlp_conv(x, lambda read: read), x)
    latents = fresh.selector.latents(jnp.ones((1, 4, 8)), jnp.zeros((1, 4), jnp.int32))
    assert latents.any()
    logits = jnp.ones((1, 3))
    np.testing.assert_array_equal(fresh.selector.scores(logits, jnp.arange(3)[None], latents[:, 0]), logits)
