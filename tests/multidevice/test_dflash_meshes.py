"""DFlash over the axes of the mesh: losses, counts and weights of one device, whatever is split; every matrix gradient
crosses devices once."""

import functools

import dflash
import jax
import numpy as np
import pytest
from flax import nnx
from reductions import matrices
from steps_on_mesh import (
    LENGTH,
    MESHES,
    STEPS,
    E,
    Trained,
    assert_trained_alike,
    host_batch,
    reduced_inside,
    rows_of_weights,
    trained,
)
from test_contracts import V, target_config

from flaxdraft.algorithms.dflash.drafts import qwen3
from flaxdraft.devices.mesh import make_mesh
from flaxdraft.devices.weight_places import check_heads
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Draw, Example, Features, VocabMap
from flaxdraft.nn.precision import Precision
from flaxdraft.train.batch_placement import SHARDING, training_example

pytestmark = pytest.mark.slow

ALGORITHM = dflash.algorithm(
    block_size=4, num_anchors=3, attention="chunked", attention_chunk=8, loss_chunk=8, objective="dpace"
)  # fmt: skip


def host_example(step: int) -> Example:
    rng = np.random.default_rng(step)
    batch = host_batch(rng)
    taps = rng.normal(size=(*batch.tokens_BT.shape, 5, E)).astype(np.float32)
    return Example(batch, Features(taps, taps[:, :, 0]), ALGORITHM.choose(batch, LENGTH, Draw(0, step, 0)))


@functools.cache
def train(shape: tuple[tuple[str, int], ...], num_microbatches: int, algorithm=ALGORITHM, module=qwen3) -> Trained:
    mesh, target = make_mesh(**dict(shape)), target_config()
    own = {"block_size": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 1}
    own["attention_sink_bias"] = True
    config = module.Config(**module.Config.for_target(target, V) | own)
    check_heads(config, SHARDING, mesh.shape)
    with jax.set_mesh(mesh):
        draft = module.make(
            config, VocabMap(np.arange(V), V), dflash.target_of(rows_of_weights(0), rows_of_weights(1)),
            precision=Precision(), sharding=SHARDING, rngs=nnx.Rngs(0),
        )  # fmt: skip
        return trained(algorithm, draft, (), [*map(host_example, range(STEPS))], mesh, num_microbatches)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_training_is_that_of_one_device(shape):
    assert_trained_alike(train(tuple(shape.items()), 2), train((), 1))


def test_every_matrix_gradient_is_reduced_once_after_the_loop():
    shape = {"data": 2, "fsdp": 2, "tensor": 2}
    inside = reduced_inside(train(tuple(shape.items()), 2), shape["tensor"])
    assert not matrices(inside), inside


def test_rows_are_not_shared():
    with pytest.raises(InputError, match=r"mesh.sequence: found 2, but dflash does not share the rows"):
        training_example(host_example(0), make_mesh(sequence=2), ALGORITHM, ())
