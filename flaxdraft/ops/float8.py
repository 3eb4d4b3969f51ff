"""Matrix products of float8 numbers, forward and backward, with current scaling.

Inputs and weights are rounded to e4m3, the gradients that come back to e5m2 (arXiv 2209.05433), each array by one scale
made from its own largest number. Scales are powers of two, so that bringing the rounded numbers back is exact in
bfloat16 and costs no second rounding. What is written here is the product of the numbers brought back; on GPUs that
multiply float8 (Hopper and later), XLA turns it into their product, with the scales beside it. Elsewhere the same
numbers come out, slower than without.

Shape letters: I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Float

from flaxdraft.mesh import spec_of

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2


def rounded(x: Float[Array, "*shape"], dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """x through float8 and back. What is not finite makes NaN of itself, as it should."""
    spec = spec_of(x)
    if spec.reduced:  # says how gradients come back, which is no matter here; no maximum is made of such an array
        x = jax.reshard(x, P(*spec.partitions))
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    _, exponent = jnp.frexp(largest / float(jnp.finfo(dtype).max))
    scale = jnp.ldexp(jnp.float32(1), exponent).astype(x.dtype)
    # XLA takes a conversion there and back for excess precision and drops the pair, unless something is between them.
    narrow = jax.lax.optimization_barrier((x / scale).astype(dtype))
    x = narrow.astype(x.dtype) * scale
    return jax.reshard(x, spec) if spec.reduced else x


@jax.custom_vjp
def _narrow(x):
    """Rounded on the way forward; the slope passes."""
    return rounded(x, FORWARD)


_narrow.defvjp(lambda x: (rounded(x, FORWARD), None), lambda _, slope: (slope,))


@jax.custom_vjp
def _narrow_slope(y):
    """y; the slope is rounded on its way back."""
    return y


_narrow_slope.defvjp(lambda y: (y, None), lambda _, slope: (rounded(slope, BACKWARD),))


def float8_product(product: Callable, x: Float[Array, "*lead I"], kernel_IO: Float[Array, "I O"]):
    """product(x, kernel), which is linear in both, and its slopes, from float8 numbers."""
    return _narrow_slope(product(_narrow(x), _narrow(kernel_IO)))
