"""P-EAGLE over the axes of the mesh: losses, counts and weights of one device, whatever is split; every matrix gradient
crosses devices once."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peagle
import pytest
from closeness import assert_close
from flax import nnx
from reductions import matrix_shapes, reduced_operands
from test_contracts import V, target_config

from flaxdraft.algorithms.peagle.drafts import llama
from flaxdraft.config import TrainConfig
from flaxdraft.devices.mesh import make_mesh
from flaxdraft.devices.weight_places import check_heads, on_mesh, weight_on_mesh
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Batch, Draw, Example, Features, VocabMap
from flaxdraft.nn.precision import Precision
from flaxdraft.train.batch_placement import SHARDING, training_example
from flaxdraft.train.optimizer import optimizer
from flaxdraft.train.state import init_state, split_draft
from flaxdraft.train.step import make_train_step

ROWS, LENGTH, STEPS, E, W = 16, 24, 4, 32, 48
ALGORITHM = peagle.algorithm(num_depths=3, attention="chunked", attention_chunk=8, loss_chunk=8)
VOCAB = VocabMap(np.arange(W), V)
CONFIG = TrainConfig(num_steps=STEPS, learning_rate=3e-3, warmup_ratio=0.1)


class Trained(NamedTuple):
    losses: list[float]
    sums: list
    params: nnx.State
    text: str  # of the compiled step


def host_example(step: int) -> Example:
    """Rows of two packed documents each."""
    rng, at_T = np.random.default_rng(step), np.arange(LENGTH)[None]
    second = rng.integers(LENGTH // 2, LENGTH - 4, (ROWS, 1))
    segments = np.where(at_T < second, 1, 2).astype(np.int32)
    positions = np.where(segments == 1, at_T, at_T - second).astype(np.int32)
    assistant = (at_T >= rng.integers(1, 9, (ROWS, 1))) & (rng.random((ROWS, LENGTH)) < 0.95)
    tokens = rng.integers(0, V, (ROWS, LENGTH)).astype(np.int32)
    batch = Batch(tokens, assistant, segments, positions)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    shape = ROWS, LENGTH
    features = Features(normal(*shape, 3, E), normal(*shape, E), rng.integers(0, V, shape), 4 + normal(*shape))
    return Example(batch, features, ALGORITHM.choose(batch, LENGTH, Draw(0, step, 0)))


@functools.cache
def train(shape: tuple[tuple[str, int], ...], num_microbatches: int) -> Trained:
    mesh, target = make_mesh(**dict(shape)), target_config()
    own = {"num_attention_heads": 8, "num_key_value_heads": 4}
    config = llama.Config(**llama.Config.for_target(target, W) | own)
    check_heads(config, SHARDING, mesh.shape)
    normal = lambda seed: 0.3 * np.random.default_rng(seed).normal(size=(V, E)).astype(np.float32)  # noqa: E731
    with jax.set_mesh(mesh):
        target = peagle.target_of(normal(0), normal(1))
        draft = llama.make(config, VOCAB, target, precision=Precision(), sharding=SHARDING, rngs=nnx.Rngs(0))
        graphdef, params, frozen = split_draft(draft)
        params, frozen = (on_mesh(state, mesh, SHARDING) for state in (params, frozen))
        tx = optimizer(CONFIG)
        state = jax.jit(lambda params: init_state(params, tx, ALGORITHM))(params)
        head = ALGORITHM.teacher(target, VOCAB, jnp.float32)
        teacher = weight_on_mesh("head", head, mesh, SHARDING.weight_ve)
        examples = [training_example(host_example(step), mesh, ALGORITHM, teacher) for step in range(STEPS)]
        step = make_train_step(graphdef, ALGORITHM, tx, jnp.float32, num_microbatches)
        compiled, losses, sums = step.lower(state, frozen, examples[0]).compile(), [], []
        for example in examples:
            state, metrics = compiled(state, frozen, example)
            losses.append(float(metrics.loss))
            sums.append(jax.device_get(metrics.sums))
    return Trained(losses, sums, jax.device_get(state.params), compiled.as_text())


pytestmark = pytest.mark.slow
MESHES = [pytest.param({"data": 2, "fsdp": 2, "tensor": 2})]
MESHES += [pytest.param(shape) for shape in ({"data": 8}, {"fsdp": 8}, {"tensor": 4})]


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_training_is_that_of_one_device(shape):
    got, want = train(tuple(shape.items()), 2), train((), 1)
    assert_close(got.losses, want.losses, ulp=80, dtype=np.float32)
    for a, b in zip(got.sums, want.sums, strict=True):
        for name in ("count", "asked_D", "hit_D", "chain_D", "prefix_hit_D"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert_close(got.params, want.params, ulp=80, of="norm")


def test_every_matrix_gradient_is_reduced_once_after_the_loop():
    shape = {"data": 2, "fsdp": 2, "tensor": 2}
    trained = train(tuple(shape.items()), 2)
    inside, outside = reduced_operands(trained.text)
    wanted = matrix_shapes(trained, shape["tensor"])
    assert {key: outside[key] for key in wanted} == dict(wanted)
    # The masked place is one row, so that the gradients of its norms are vectors that look like matrices.
    assert not [shape for shape in inside if len(shape) == 2 and shape[0] > 1], inside


def test_rows_are_not_shared():
    with pytest.raises(InputError, match=r"mesh.sequence: found 2, but peagle does not share the rows"):
        training_example(host_example(0), make_mesh(sequence=2), ALGORITHM, ())
