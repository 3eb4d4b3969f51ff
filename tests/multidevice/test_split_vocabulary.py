"""The distillation loss with its head split by vocabulary over eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from jax import P
from test_distillation import ACCEPTED, WEIGHTS, make, weighted

from flaxdraft.devices.mesh import TENSOR_AXIS, make_mesh
from flaxdraft.devices.per_device import per_device
from flaxdraft.ops.distillation import DistillOptions, distill
from flaxdraft.ops.objectives import OBJECTIVES
from flaxdraft.ops.vocabulary_axis import first_at, highest

pytestmark = pytest.mark.numeric

W = 16


def every_objective(num_devices: int):
    """Sums, hits and gradients of each objective, in one program."""
    states, head, teacher, _, supervised = make()
    rng = np.random.default_rng(5)
    head = jnp.asarray(rng.normal(size=(head.shape[0], W)), jnp.float32)
    teacher_head = jnp.asarray(rng.normal(size=(W, teacher.last_BRE.shape[-1])), jnp.float32)
    mesh = make_mesh(tensor=num_devices)
    place = lambda tree, spec: jax.device_put(tree, jax.NamedSharding(mesh, spec))  # noqa: E731
    with jax.set_mesh(mesh):
        states, teacher, supervised, teacher_head = place((states, teacher, supervised, teacher_head), P())
        head = place(head, P(None, TENSOR_AXIS))

        def loss(states, head, objective):
            plan = DistillOptions(WEIGHTS, objective, chunk=4)
            sums, hit = distill(plan, states, head, teacher, teacher_head, supervised, ACCEPTED)
            return weighted(sums), (sums, hit)

        grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        return jax.device_get(jax.jit(lambda *a: {name: grad(*a, name) for name in OBJECTIVES})(states, head))


def test_every_objective_is_that_of_one_device():
    want, got = (every_objective(n) for n in (1, 8))
    assert_close(got, want, ulp=25)


def test_the_lowest_id_wins_a_tie():
    logits = np.random.default_rng(0).integers(0, 3, (200, W)).astype(np.float32)
    mesh = make_mesh(tensor=8)
    with jax.set_mesh(mesh):
        placed = jax.device_put(logits, jax.NamedSharding(mesh, P(None, TENSOR_AXIS)))
        got = jax.jit(lambda x: per_device(lambda x: first_at(x, highest(x, TENSOR_AXIS), TENSOR_AXIS), P(), x))(placed)
    np.testing.assert_array_equal(got, logits.argmax(axis=-1))
    assert (np.sum(logits == logits.max(axis=-1, keepdims=True), axis=-1) > 1).mean() > 0.9
