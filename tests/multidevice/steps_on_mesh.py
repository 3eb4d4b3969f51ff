"""A few optimizer steps of a small draft on a mesh of any shape, and what must be the same as on one device."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from flax import nnx
from reductions import matrix_shapes, reduced_operands
from test_contracts import V

from flaxdraft.config import TrainConfig
from flaxdraft.devices.weight_places import on_mesh
from flaxdraft.interfaces import Algorithm, Batch, Example
from flaxdraft.train.batch_placement import SHARDING, training_example
from flaxdraft.train.optimizer import optimizer
from flaxdraft.train.state import init_state, split_draft
from flaxdraft.train.step import make_train_step

ROWS, LENGTH, STEPS, E = 16, 24, 4, 32
CONFIG = TrainConfig(num_steps=STEPS, learning_rate=3e-3, warmup_ratio=0.1)
# Each axis alone is for changes of sharding; with every change EAGLE-3's drafts have each (test_meshes.py).
MESHES = [pytest.param({"data": 2, "fsdp": 2, "tensor": 2})]
MESHES += [pytest.param(shape, marks=pytest.mark.exhaustive) for shape in ({"data": 8}, {"fsdp": 8}, {"tensor": 4})]


class Trained(NamedTuple):
    losses: list[float]
    sums: list
    params: nnx.State
    text: str  # of the compiled step


def host_batch(rng: np.random.Generator) -> Batch:
    """Rows of two packed documents each."""
    at_T = np.arange(LENGTH)[None]
    second = rng.integers(LENGTH // 2, LENGTH - 4, (ROWS, 1))
    segments = np.where(at_T < second, 1, 2).astype(np.int32)
    positions = np.where(segments == 1, at_T, at_T - second).astype(np.int32)
    assistant = (at_T >= rng.integers(1, 9, (ROWS, 1))) & (rng.random((ROWS, LENGTH)) < 0.95)
    return Batch(rng.integers(0, V, (ROWS, LENGTH)).astype(np.int32), assistant, segments, positions)


def rows_of_weights(seed: int) -> np.ndarray:
    """An embedding or a head of the target."""
    return 0.3 * np.random.default_rng(seed).normal(size=(V, E)).astype(np.float32)


def trained(
    algorithm: Algorithm, draft: nnx.Module, teacher: Any, hosts: Sequence[Example], mesh: jax.sharding.Mesh,
    num_microbatches: int,
) -> Trained:  # fmt: skip
    """One step on each batch; to be called inside `jax.set_mesh`."""
    graphdef, params, frozen = split_draft(draft)
    params, frozen = (on_mesh(state, mesh, SHARDING) for state in (params, frozen))
    tx = optimizer(CONFIG)
    state = jax.jit(lambda params: init_state(params, tx, algorithm))(params)
    examples = [training_example(host, mesh, algorithm, teacher) for host in hosts]
    step = make_train_step(graphdef, algorithm, tx, jnp.float32, num_microbatches)
    compiled, losses, sums = step.lower(state, frozen, examples[0]).compile(), [], []
    for example in examples:
        state, metrics = compiled(state, frozen, example)
        losses.append(float(metrics.loss))
        sums.append(jax.device_get(metrics.sums))
    return Trained(losses, sums, jax.device_get(state.params), compiled.as_text())


def assert_trained_alike(got: Trained, want: Trained) -> None:
    """Losses and weights up to rounding, counts exactly."""
    assert_close(got.losses, want.losses, ulp=80, dtype=np.float32)
    for a, b in zip(got.sums, want.sums, strict=True):
        counts = [x for x in zip(*map(jax.tree.leaves, (a, b)), strict=True) if np.issubdtype(x[0].dtype, np.integer)]
        assert counts
        for one, other in counts:
            np.testing.assert_array_equal(one, other)
    assert_close(got.params, want.params, ulp=80, of="norm")


def reduced_inside(trained: Trained, tensor: int) -> Any:
    """What is reduced inside of loops, by shape, where each matrix gradient is reduced once outside of them.

    Args:
        tensor: devices along that axis.
    """
    inside, outside = reduced_operands(trained.text)
    wanted = matrix_shapes(trained, tensor)
    assert {key: outside[key] for key in wanted} == dict(wanted)
    return inside
