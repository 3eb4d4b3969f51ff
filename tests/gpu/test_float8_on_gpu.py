"""That XLA makes float8 products of what ops/float8.py writes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdraft.ops.float8 import float8_product

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_all_three_products_are_of_float8_numbers(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, 256, 512), (512, 1024), (2, 256, 1024)
    x, kernel, slope = (jax.random.normal(*of, dtype) for of in zip(keys, shapes, strict=True))

    def product_and_slopes(x, kernel, slope):
        y, pull = jax.vjp(float8_product, x, kernel)
        return y, *pull(slope)

    compiled = jax.jit(product_and_slopes).lower(x, kernel, slope).compile()
    by_cublas = re.findall(r"custom-call\(.*__cublas\$lt\$matmul\$f8", compiled.as_text())
    by_triton = re.findall(r"^%gemm_fusion\S+_computation \(\S+ f8\S+, \S+ f8", compiled.as_text(), re.MULTILINE)
    assert len(by_cublas) + len(by_triton) == 3
    with jax.default_device(jax.devices("cpu")[0]):
        want = product_and_slopes(*jax.device_get((x, kernel, slope)))
    for got, by_cpu in zip(compiled(x, kernel, slope), want, strict=True):
        np.testing.assert_allclose(got.astype(jnp.float32), by_cpu.astype(jnp.float32), rtol=2e-2, atol=0.5)
