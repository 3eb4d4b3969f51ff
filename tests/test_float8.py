"""Products of float8 numbers: what is rounded, by how much, and what is left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from compiling import needs_float8

from flaxdraft.ops.float8 import BACKWARD, FORWARD, float8_product, narrowed

pytestmark = [pytest.mark.numeric, needs_float8]


def numbers(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def rounded(x, dtype):
    numbers, scale = narrowed(x, dtype)
    assert numbers.dtype == dtype
    return numbers.astype(x.dtype) * scale


@pytest.mark.parametrize(("dtype", "digits"), [(FORWARD, 3), (BACKWARD, 2)])
def test_numbers_keep_their_digits(dtype, digits):
    x = numbers(64, 128)
    got = rounded(x, dtype)
    large = np.abs(x) > float(jnp.max(jnp.abs(x))) * 2.0**-12  # smaller ones have fewer digits
    assert np.abs(got / x - 1)[large].max() <= 2.0 ** -(digits + 1)
    assert np.abs(got - x)[~large].max() <= float(jnp.max(jnp.abs(x))) * 2.0**-15
    np.testing.assert_array_equal(rounded(got, dtype), got)


@pytest.mark.parametrize("exponent", [-60, -3, 40])
def test_the_scale_of_an_array_does_not_matter(exponent):
    x = numbers(16, 16, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(rounded(x * 2.0**exponent, FORWARD), rounded(x, FORWARD) * 2.0**exponent)


def test_zeros_stay_and_what_is_not_finite_shows():
    np.testing.assert_array_equal(rounded(jnp.zeros(3), FORWARD), 0)
    for bad in (jnp.nan, jnp.inf):
        assert not np.isfinite(rounded(jnp.array([1.0, bad]), FORWARD)).all()


def test_products_and_slopes_are_those_of_the_rounded_numbers():
    x, kernel, slope = numbers(2, 8, 32), numbers(32, 16, seed=1), numbers(2, 8, 16, seed=2)
    y, pull = jax.vjp(float8_product, x, kernel)
    x8, kernel8, slope8 = rounded(x, FORWARD), rounded(kernel, FORWARD), rounded(slope, BACKWARD)
    assert_close(y, x8 @ kernel8, ulp=10)
    assert_close(pull(slope), (slope8 @ kernel8.T, jnp.einsum("bti,bto->io", x8, slope8)), ulp=5)
