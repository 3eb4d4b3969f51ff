"""P-EAGLE over the axes of the mesh: losses, counts and weights of one device, whatever is split; every matrix gradient
crosses devices once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import peagle
import pytest
from flax import nnx
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

from flaxdraft.algorithms.peagle.drafts import llama
from flaxdraft.devices.mesh import make_mesh
from flaxdraft.devices.weight_places import check_heads, weight_on_mesh
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Draw, Example, Features, VocabMap
from flaxdraft.nn.precision import Precision
from flaxdraft.train.batch_placement import SHARDING, training_example

pytestmark = pytest.mark.slow

W = 48
ALGORITHM = peagle.algorithm(num_depths=3, attention="chunked", attention_chunk=8, loss_chunk=8)
VOCAB = VocabMap(np.arange(W), V)


def host_example(step: int) -> Example:
    rng = np.random.default_rng(step)
    batch = host_batch(rng)
    shape = batch.tokens_BT.shape
    normal = lambda *tail: rng.normal(size=(*shape, *tail)).astype(np.float32)  # noqa: E731
    features = Features(normal(3, E), normal(E), rng.integers(0, V, shape), 4 + normal())
    return Example(batch, features, ALGORITHM.choose(batch, LENGTH, Draw(0, step, 0)))


@functools.cache
def train(shape: tuple[tuple[str, int], ...], num_microbatches: int) -> Trained:
    mesh = make_mesh(**dict(shape))
    own = {"num_attention_heads": 8, "num_key_value_heads": 4}
    config = llama.Config(**llama.Config.for_target(target_config(), W) | own)
    check_heads(config, SHARDING, mesh.shape)
    with jax.set_mesh(mesh):
        target = peagle.target_of(rows_of_weights(0), rows_of_weights(1))
        draft = llama.make(config, VOCAB, target, precision=Precision(), sharding=SHARDING, rngs=nnx.Rngs(0))
        head = ALGORITHM.teacher(target, VOCAB, jnp.float32)
        teacher = weight_on_mesh("head", head, mesh, SHARDING.weight_ve)
        return trained(ALGORITHM, draft, teacher, [*map(host_example, range(STEPS))], mesh, num_microbatches)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_training_is_that_of_one_device(shape):
    assert_trained_alike(train(tuple(shape.items()), 2), train((), 1))


def test_every_matrix_gradient_is_reduced_once_after_the_loop():
    shape = {"data": 2, "fsdp": 2, "tensor": 2}
    inside = reduced_inside(train(tuple(shape.items()), 2), shape["tensor"])
    # The masked place is one row, so that the gradients of its norms are vectors that look like matrices.
    assert not [shape for shape in inside if len(shape) == 2 and shape[0] > 1], inside


def test_rows_are_not_shared():
    with pytest.raises(InputError, match=r"mesh.sequence: found 2, but peagle does not share the rows"):
        training_example(host_example(0), make_mesh(sequence=2), ALGORITHM, ())
