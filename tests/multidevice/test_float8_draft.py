"""A draft whose layer's products are of float8 numbers, on one device and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from compiling import needs_float8
from flax import nnx
from jax import P
from training import host_batch, setup, train

from flaxdraft.devices.mesh import make_mesh
from flaxdraft.ops.float8 import float8_product

ROWS = P(("data", "fsdp"), None, None)


def test_fc_is_rounded_and_the_head_is_not():
    """A few bits are left, so hidden states differ by a few percent; the logits of equal states do not."""
    host, head_WE = host_batch(num_rows=8)
    taps, hidden, logits = jnp.asarray(host.features.taps_BTKE), [], []
    for float8 in (False, True):
        run = setup("llama", {}, head_WE, float8=float8)
        with jax.set_mesh(run.mesh):
            draft = nnx.merge(run.graphdef, run.params, run.frozen)
            hidden.append(draft.project(taps))
            logits.append(draft.logits(hidden[0]))
    off = jnp.linalg.norm(hidden[1] - hidden[0]) / jnp.linalg.norm(hidden[0])
    assert 1e-3 < off < 0.1
    np.testing.assert_array_equal(*logits)


@needs_float8
@pytest.mark.numeric
def test_slopes_on_a_mesh_are_those_of_one_device():
    """The kernel's stays in each device's own part, as its type asks for, and is then added up."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel, slope = (jax.random.normal(*of) for of in zip(keys, ((4, 8, 32), (32, 16), (4, 8, 16)), strict=True))

    def products(x, kernel, slope, out_spec=None):
        y, pull = jax.vjp(lambda x, kernel: float8_product(x, kernel, out_spec), x, kernel)
        return y, *pull(slope)

    @jax.jit
    def on_mesh(x, kernel, slope):
        kernel = jax.reshard(kernel, P(None, None, reduced={"data", "fsdp"}))
        y, x_slope, kernel_slope = products(x, kernel, slope, ROWS)
        assert jax.typeof(kernel_slope).sharding.spec.unreduced == {"data", "fsdp"}
        return y, x_slope, jax.reshard(kernel_slope, P(None, None))

    mesh = make_mesh(fsdp=4)
    with jax.set_mesh(mesh):
        put = lambda a, spec: jax.device_put(a, jax.NamedSharding(mesh, spec))  # noqa: E731
        got = on_mesh(put(x, ROWS), put(kernel, P()), put(slope, ROWS))
    assert_close(got, products(x, kernel, slope), ulp=5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mla"])
def test_the_curve_is_that_of_one_device(name):
    """The first step to the last bits; afterwards a difference there moves a number to the next in float8 now and
    then, a sixteenth of itself away."""
    alone = train(name, {}, 1, float8=True)
    split = train(name, {"fsdp": 4, "tensor": 2}, 1, float8=True)
    assert_close(split.losses[:2], alone.losses[:2], ulp=8, dtype=np.float32)
    assert_close(split.losses, alone.losses, rtol=1e-4)
