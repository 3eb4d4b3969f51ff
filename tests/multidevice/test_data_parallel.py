"""The train step over 1 and 8 devices: same sums, same losses, same weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_contracts import DRAFTS, T, V, W, example, target_config

from flaxdraft.algorithms.eagle3 import Algorithm
from flaxdraft.config import TrainConfig
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Example, VocabMap
from flaxdraft.mesh import BATCH_AXIS, Sharding, make_mesh
from flaxdraft.precision import Precision
from flaxdraft.train.optimizer import optimizer
from flaxdraft.train.state import init_state, split_draft
from flaxdraft.train.step import make_train_step

CONFIG = TrainConfig(num_steps=3, learning_rate=1e-2, warmup_ratio=0.0)


def train(name: str, num_devices: int):
    """Three steps on one global batch of eight rows; (losses, sums of the last step, parameters)."""
    mesh = make_mesh(num_devices)
    module = DRAFTS[name]
    config = module.Config(**module.Config.for_target(target_config(), W))
    with jax.set_mesh(mesh):
        draft = module.make(
            config, VocabMap(np.arange(W) * 2, V), jnp.ones((V, 32)) * 0.1, precision=Precision(),
            sharding=Sharding.data_parallel(), rngs=nnx.Rngs(0),
        )  # fmt: skip
        graphdef, params, frozen = split_draft(draft)
        everywhere = jax.NamedSharding(mesh, jax.P())
        params, frozen = jax.device_put((params, frozen), everywhere)
        tx = optimizer(CONFIG)
        state = jax.jit(lambda p: init_state(p, tx, 3))(params)
        step = make_train_step(graphdef, Algorithm(3), tx)
        host = ragged_example()
        split = lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P(BATCH_AXIS)))  # noqa: E731
        batch, features, rows = jax.tree.map(split, (host.batch, host.features, host.rows_BR))
        losses = []
        for _ in range(3):
            state, metrics = step(
                state, frozen, Example(batch, features, rows, jax.device_put(host.teacher_head_WE, everywhere))
            )
            losses.append(float(metrics.loss))
        assert step._cache_size() == 1  # one shape, one compile
        placed = {leaf.sharding.spec for leaf in jax.tree.leaves(state.params)}
        assert all(spec == jax.P() or set(spec) == {None} for spec in placed)
    return losses, jax.device_get(metrics.sums), jax.device_get(state.params)


def ragged_example():
    """Eight rows whose supervised parts differ in length, one of them empty."""
    host = example(8)
    starts = np.array([4, 5, 6, 7, 8, 9, 4, T])
    assistant = jnp.asarray(np.arange(T)[None] >= starts[:, None])
    return dataclasses.replace(host, batch=dataclasses.replace(host.batch, assistant_BT=assistant))


@pytest.mark.parametrize("name", DRAFTS)
def test_devices_do_not_change_the_result(name):
    losses, sums, params = train(name, 1)
    split_losses, split_sums, split_params = train(name, 8)
    np.testing.assert_allclose(split_losses, losses, rtol=1e-5)
    for field in ("loss_count_J", "row_count_J", "hit_J", "prefix_hit_J"):
        np.testing.assert_array_equal(getattr(split_sums, field), getattr(sums, field))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), split_params, params)
    assert losses[-1] < losses[0]


def test_more_devices_than_there_are():
    with pytest.raises(InputError, match=r"mesh.data: 64 devices were asked for, 8 are visible"):
        make_mesh(64)
