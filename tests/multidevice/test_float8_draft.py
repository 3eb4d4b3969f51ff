"""A draft whose layer's products are of float8 numbers, on one device and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from training import host_batch, setup, train


def test_the_layer_is_rounded_and_the_head_is_not():
    """A few bits are left, so hidden states differ by a few percent; the logits of equal states do not."""
    host, head_WE = host_batch(num_rows=8)
    taps, hidden, logits = jnp.asarray(host.features.taps_BT3E), [], []
    for float8 in (False, True):
        run = setup("llama", {}, head_WE, float8=float8)
        with jax.set_mesh(run.mesh):
            draft = nnx.merge(run.graphdef, run.params, run.frozen)
            hidden.append(draft.project(taps))
            logits.append(draft.logits(hidden[0]))
    off = jnp.linalg.norm(hidden[1] - hidden[0]) / jnp.linalg.norm(hidden[0])
    assert 1e-3 < off < 0.1
    np.testing.assert_array_equal(*logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mla"])
def test_the_curve_is_that_of_one_device(name):
    """The first step to the last bits; afterwards a difference there moves a number to the next in float8 now and
    then, a sixteenth of itself away."""
    alone = train(name, {}, 1, float8=True)
    split = train(name, {"fsdp": 4, "tensor": 2}, 1, float8=True)
    np.testing.assert_allclose(split.losses[:2], alone.losses[:2], rtol=1e-6)
    np.testing.assert_allclose(split.losses, alone.losses, rtol=1e-4)
