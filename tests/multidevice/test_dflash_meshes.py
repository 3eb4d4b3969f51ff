"""DFlash over the axes of the mesh: losses, counts and weights of one device, whatever is split; every matrix gradient
crosses devices once."""

import functools
from typing import NamedTuple

import dflash
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from flax import nnx
from reductions import matrices, matrix_shapes, reduced_operands
from test_contracts import V, target_config

from flaxdraft.algorithms.dflash.drafts import qwen3
from flaxdraft.config import TrainConfig
from flaxdraft.devices.mesh import make_mesh
from flaxdraft.devices.weight_places import check_heads, on_mesh
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Batch, Draw, Example, Features, VocabMap
from flaxdraft.nn.precision import Precision
from flaxdraft.train.batch_placement import SHARDING, training_example
from flaxdraft.train.optimizer import optimizer
from flaxdraft.train.state import init_state, split_draft
from flaxdraft.train.step import make_train_step

ROWS, LENGTH, STEPS, E = 16, 24, 4, 32
ALGORITHM = dflash.algorithm(
    block_size=4, num_anchors=3, attention="chunked", attention_chunk=8, loss_chunk=8, objective="dpace"
)  # fmt: skip
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
    taps = rng.normal(size=(ROWS, LENGTH, 5, E)).astype(np.float32)
    return Example(batch, Features(taps, taps[:, :, 0]), ALGORITHM.choose(batch, LENGTH, Draw(0, step, 0)))


@functools.cache
def train(shape: tuple[tuple[str, int], ...], num_microbatches: int, algorithm=ALGORITHM, module=qwen3) -> Trained:
    mesh, target = make_mesh(**dict(shape)), target_config()
    own = {"block_size": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 1}
    own["attention_sink_bias"] = True
    config = module.Config(**module.Config.for_target(target, V) | own)
    check_heads(config, SHARDING, mesh.shape)
    normal = lambda seed: 0.3 * np.random.default_rng(seed).normal(size=(V, E)).astype(np.float32)  # noqa: E731
    with jax.set_mesh(mesh):
        draft = module.make(
            config, VocabMap(np.arange(V), V), dflash.target_of(normal(0), normal(1)), precision=Precision(),
            sharding=SHARDING, rngs=nnx.Rngs(0),
        )  # fmt: skip
        graphdef, params, frozen = split_draft(draft)
        params, frozen = (on_mesh(state, mesh, SHARDING) for state in (params, frozen))
        tx = optimizer(CONFIG)
        state = jax.jit(lambda params: init_state(params, tx, algorithm))(params)
        examples = [training_example(host_example(step), mesh, algorithm, ()) for step in range(STEPS)]
        step = make_train_step(graphdef, algorithm, tx, jnp.float32, num_microbatches)
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
        for name in ("asked_Q", "hit_Q", "prefix_hit_Q", "num_blocks"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert_close(got.params, want.params, ulp=80, of="norm")


def test_every_matrix_gradient_is_reduced_once_after_the_loop():
    shape = {"data": 2, "fsdp": 2, "tensor": 2}
    trained = train(tuple(shape.items()), 2)
    inside, outside = reduced_operands(trained.text)
    wanted = matrix_shapes(trained, shape["tensor"])
    assert {key: outside[key] for key in wanted} == dict(wanted)
    assert not matrices(inside), inside


def test_rows_are_not_shared():
    with pytest.raises(InputError, match=r"mesh.sequence: found 2, but dflash does not share the rows"):
        training_example(host_example(0), make_mesh(sequence=2), ALGORITHM, ())
