"""The optimizer step by itself: schedules, decay, steps that are skipped, averaged weights, compiles."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from eagle3 import algorithm as make_algorithm
from flax import nnx
from test_contracts import DRAFTS, T, V, W, example, make_draft

from flaxdraft.algorithms.eagle3.objective import ChosenRows
from flaxdraft.config import TrainConfig
from flaxdraft.data.batching import Buckets, Sizes
from flaxdraft.data.documents import Answer, AnsweredPrompts
from flaxdraft.data.pipeline import Pipeline
from flaxdraft.interfaces import Features
from flaxdraft.nn.layers import Kept
from flaxdraft.train.optimizer import optimizer, schedule
from flaxdraft.train.state import evaluation_params, init_state, split_draft
from flaxdraft.train.step import make_train_step

pytestmark = pytest.mark.numeric

CONFIG = TrainConfig(num_steps=100, learning_rate=1.0, warmup_ratio=0.1, final_lr_ratio=0.1, decay_ratio=0.2)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("cosine", {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.55, 100: 0.1}),
        ("constant", {0: 0.0, 5: 0.5, 10: 1.0, 55: 1.0, 100: 1.0}),
        ("wsd", {0: 0.0, 5: 0.5, 10: 1.0, 80: 1.0, 90: 0.55, 100: 0.1, 200: 0.1}),
    ],
)
def test_schedules(name, want):
    rate = schedule(CONFIG.model_copy(update={"schedule": name}))
    got = np.asarray([rate(step) for step in want])
    assert_close(got, np.asarray([*want.values()]), ulp=8)  # of the highest rate, 1


def test_a_schedule_that_is_all_warmup_and_decay():
    rate = schedule(CONFIG.model_copy(update={"schedule": "wsd", "num_steps": 3, "decay_ratio": 1.0}))
    assert [round(float(rate(step)), 3) for step in range(4)] == [0.0, 1.0, 0.55, 0.1]


def test_norms_do_not_decay():
    """Without a gradient nothing but decay moves a weight."""
    params = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2)}
    tx = optimizer(CONFIG.model_copy(update={"weight_decay": 0.5, "schedule": "constant"}))
    state = tx.init(params)
    for _ in range(2):  # the first rate of the warmup is 0
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    assert_close(updates["kernel"], np.full((2, 2), -0.5 * 0.1), ulp=8)
    assert not updates["scale"].any()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_head_that_is_kept_does_not_decay(kind):
    params = nnx.State({"kernel": nnx.Param(jnp.ones((2, 2))), "lm_head": Kept(jnp.ones((2, 2)))})
    changed = {"weight_decay": 0.5, "schedule": "constant", "optimizer": kind}
    tx = optimizer(CONFIG.model_copy(update=changed))
    state = tx.init(params)
    for _ in range(2):  # the first rate of the warmup is 0
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    assert_close(updates["kernel"][...], np.full((2, 2), -0.5 * 0.1), ulp=8)
    assert not updates["lm_head"][...].any()


def test_muon_is_for_matrices_between_states():
    """Its updates are near orthogonal; all others get AdamW's, whose first update is the sign."""
    rng = np.random.default_rng(0)
    shapes = {"fc": (6, 4), "lm_head": (6, 4), "norm": (4,), "mask": (1, 1, 4)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    tx = optimizer(CONFIG.model_copy(update={"optimizer": "muon", "schedule": "constant", "warmup_ratio": 0.0}))
    state = tx.init(params)
    _, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)  # the first rate of the warmup is 0
    updates, _ = tx.update(params, state, params)
    values = np.linalg.svd(np.asarray(updates["fc"]), compute_uv=False)
    assert values.max() / values.min() < 2 < np.linalg.cond(params["fc"])
    for name in ("lm_head", "norm", "mask"):
        np.testing.assert_array_equal(np.sign(updates[name]), -np.sign(params[name]))
        assert np.ptp(np.abs(updates[name])) < 1e-3
        assert_close(np.abs(updates[name]).max(), np.abs(updates["norm"]).max(), rtol=1e-3)


@pytest.fixture(scope="module")
def averaged():
    """(graphdef, frozen, fresh state, step) that keeps a running mean."""
    graphdef, params, frozen = split_draft(make_draft(DRAFTS["llama"]))
    tx = optimizer(CONFIG.model_copy(update={"learning_rate": 1e-2}))
    algorithm = make_algorithm(3)
    step = make_train_step(graphdef, algorithm, tx, jnp.float32, ema_decay=0.75)
    return frozen, lambda: init_state(jax.tree.map(jnp.copy, params), tx, algorithm, ema=True), step


def test_a_step_that_is_not_finite_changes_nothing(averaged):
    frozen, fresh, step = averaged
    good = example()
    broken = dataclasses.replace(
        good, features=dataclasses.replace(good.features, taps_BTKE=good.features.taps_BTKE.at[0, 5].set(jnp.nan))
    )
    state, metrics = step(fresh(), frozen, good)
    assert int(metrics.skipped) == 0
    before = jax.device_get(state)
    state, metrics = step(state, frozen, broken)
    assert not np.isfinite(metrics.loss)
    after = jax.device_get(state)
    assert (int(after.step), int(after.skipped), int(metrics.skipped)) == (2, 1, 1)
    same = dataclasses.replace(after, step=before.step, skipped=before.skipped)
    jax.tree.map(np.testing.assert_array_equal, same, before)
    state, metrics = step(state, frozen, good)  # and training goes on
    assert np.isfinite(metrics.loss)
    assert int(state.skipped) == 1
    assert any(
        (a != b).any() for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(before.params), strict=True)
    )


def test_the_running_mean_is_what_is_evaluated(averaged):
    frozen, fresh, step = averaged
    state = fresh()
    means = jax.device_get(state.params)
    for _ in range(3):
        state, _ = step(state, frozen, example())
        means = jax.tree.map(lambda m, p: 0.75 * m + 0.25 * np.asarray(p), means, state.params)
    assert_close(evaluation_params(state), means, rtol=2e-7, of="norm")  # single entries may cancel out to nearly 0
    plain = dataclasses.replace(state, ema=None)
    assert evaluation_params(plain) is plain.params


def test_acceptance_is_that_of_the_last_global_batch(averaged):
    frozen, fresh, step = averaged
    state, metrics = step(fresh(), frozen, example())
    assert_close(state.carry, metrics.sums.expected_accept_J / metrics.sums.row_count_J, ulp=8, of="each")
    nothing = dataclasses.replace(example(), chosen=ChosenRows(jnp.full_like(example().chosen.rows_BR, T)))
    kept = np.asarray(state.carry)
    state, metrics = step(state, frozen, nothing)
    np.testing.assert_array_equal(state.carry, kept)
    assert step._cache_size() == 1


@pytest.mark.slow  # by default the whole loop is watched for the same (tests/multiprocess/test_guards.py)
def test_two_length_buckets_compile_twice():
    """200 steps through the batches of a pipeline."""
    rng = np.random.default_rng(0)

    def row(length):
        normal = lambda *tail: rng.normal(size=(length, *tail)).astype(np.float32)  # noqa: E731
        tokens = rng.integers(0, V, length).astype(np.int32)
        return Answer(tokens, 4, Features(normal(3, 32), normal(32), tokens, normal() + 5))

    algorithm = make_algorithm(2)
    documents = AnsweredPrompts([row(length) for length in (20, 21, 22, 23, 24, 25, 50, 51, 52)], V)
    sizes = Sizes(documents.lengths, documents.supervised)
    pipeline = Pipeline(documents, algorithm, Buckets(sizes, batch_size=2, seed=0, num_buckets=2), 2)
    graphdef, params, frozen = split_draft(make_draft(DRAFTS["llama"]))
    tx = optimizer(CONFIG.model_copy(update={"learning_rate": 1e-3, "num_steps": 200}))
    step, head_WE = (
        make_train_step(graphdef, algorithm, tx, jnp.float32),
        jnp.asarray(rng.normal(size=(W, 32)), jnp.float32),
    )
    state = jax.jit(lambda params: init_state(params, tx, algorithm))(params)
    lengths = set()
    for i in range(200):
        host = pipeline.batch(i)
        lengths.add(host.batch.tokens_BT.shape)
        state, _ = step(state, frozen, dataclasses.replace(host, teacher=head_WE))
    assert int(state.step) == 200
    assert len(lengths) == 2
    assert step._cache_size() == 2
