"""Matrix products of float8 numbers, forward and backward, with current scaling.

Inputs and weights are rounded to e4m3, the gradients that come back to e5m2 (arXiv 2209.05433), each array by one scale
made from its own largest number. Scales are powers of two, so that taking them out again is exact. GPUs that multiply
float8 (Hopper and later) multiply these numbers as they are; elsewhere the same products come out, slower than without.

Shape letters: B batch, T time, I inputs, O outputs.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Float

from flaxdraft.devices.per_device import scaled
from flaxdraft.devices.sharding import gradient_spec, spec_of

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2


class Narrow(NamedTuple):
    """numbers * scale is the array that was rounded."""

    numbers: Float[Array, "*shape"]
    scale: Float[Array, ""]


def narrowed(x: Float[Array, "*shape"], dtype: jnp.dtype) -> Narrow:
    """x in float8, as large as that reaches; what is not finite makes NaN of itself, as it should."""
    spec = spec_of(x)
    if spec.reduced:  # no maximum is made of such an array; it says how gradients come back, not where x is
        x = jax.reshard(x, P(*spec.partitions))
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    _, exponent = jnp.frexp(largest / float(jnp.finfo(dtype).max))
    scale = jnp.ldexp(jnp.float32(1), exponent).astype(x.dtype)
    numbers = (x / scale).astype(dtype)
    return Narrow(jax.reshard(numbers, spec) if spec.reduced else numbers, scale)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def float8_product(
    x_BTI: Float[Array, "B T I"], kernel_IO: Float[Array, "I O"], out_spec: P | None = None
) -> Float[Array, "B T O"]:
    """x @ kernel, in the precision of both.

    Args:
        out_spec: where the result lives.
    """
    return _forward(x_BTI, kernel_IO, out_spec)[0]


def _forward(x_BTI, kernel_IO, out_spec):
    x, kernel = narrowed(x_BTI, FORWARD), narrowed(kernel_IO, FORWARD)
    return _product("bti,io->bto", x, kernel, out_spec), (x, kernel)


def _backward(out_spec, factors, slope_BTO):
    (x, kernel), slope = factors, narrowed(slope_BTO, BACKWARD)
    return (
        _product("bto,io->bti", slope, kernel, gradient_spec(x.numbers)),
        _product("bti,bto->io", x, slope, gradient_spec(kernel.numbers)),
    )


def _product(how: str, a: Narrow, b: Narrow, out_spec: P | None) -> jax.Array:
    mesh, dtype = jax.sharding.get_abstract_mesh(), a.scale.dtype
    if mesh.empty:
        out_spec, here = None, None
    elif mesh.size > 1 or out_spec is None:
        here = out_spec
    else:  # JAX lowers no unreduced product with a scale on a mesh of one device
        here = P(*out_spec.partitions)
    product = jnp.einsum(how, a.numbers, b.numbers, preferred_element_type=dtype, out_sharding=here)
    out = scaled(product, a.scale * b.scale, dtype)
    return out if here == out_spec else jax.reshard(out, out_spec)


float8_product.defvjp(_forward, _backward)
