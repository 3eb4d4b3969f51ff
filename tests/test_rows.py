"""Rows taken from a batch, and their gradient, against plain indexing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close

from flaxdraft.ops.rows import take_rows

pytestmark = pytest.mark.numeric

ROWS = jnp.asarray([[0, 2, 5, 9, 9], [1, 2, 3, 4, 7]])  # of six; what lies past the end repeats


def test_rows_past_the_end_read_zero():
    x = jnp.arange(1.0, 5.0)[None, :, None]
    assert take_rows(x, jnp.array([[1, 4, 9]]))[0, :, 0].tolist() == [2.0, 0.0, 0.0]


def test_the_gradient_goes_back_to_the_rows_taken():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 3)), jnp.float32)
    weight = jnp.arange(30.0).reshape(2, 5, 3)
    got = jax.grad(lambda x: jnp.sum(jnp.sin(take_rows(x, ROWS)) * weight))(x)
    want = np.zeros(x.shape, np.float32)
    for b, r in np.ndindex(*ROWS.shape):
        if ROWS[b, r] < 6:
            want[b, ROWS[b, r]] += np.cos(x[b, ROWS[b, r]]) * weight[b, r]
    assert_close(got, want, ulp=8, of="each")


def test_no_scatter_of_values():
    """The one scatter that is left places row numbers."""
    x = jnp.zeros((2, 6, 3))
    text = jax.jit(jax.grad(lambda x: jnp.sum(take_rows(x, ROWS) ** 2))).lower(x).as_text()
    assert text.count('"stablehlo.scatter"') == 1
