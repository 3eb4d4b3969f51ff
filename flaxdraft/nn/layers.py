"""The small blocks: norm, projection, gated feed-forward.

Thin constructors over flax NNX, so that precision is decided in one place. Kernels are stored [in, out].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flaxdraft.precision import Precision


class Frozen(nnx.Variable):
    """An array that travels with a module but is never trained."""


def linear(num_in: int, num_out: int, precision: Precision, rngs: nnx.Rngs) -> nnx.Linear:
    """A projection without bias; the usual normal initialisation with deviation 0.02."""
    return nnx.Linear(
        num_in, num_out, use_bias=False, dtype=precision.compute, param_dtype=precision.param, rngs=rngs,
        kernel_init=nnx.initializers.normal(0.02),
    )  # fmt: skip


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, statistics in float32 (float64 where the input is)."""

    def __init__(self, width: int, eps: float, precision: Precision):
        self.eps = eps
        self.precision = precision
        self.scale = nnx.Param(jnp.ones((width,), precision.param))

    def __call__(self, x: Float[Array, "*lead width"]) -> Float[Array, "*lead width"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        scale = jnp.expand_dims(self.scale[...], tuple(range(x.ndim - 1)))
        return (normed * scale).astype(self.precision.compute)


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, intermediate: int, precision: Precision, rngs: nnx.Rngs):
        self.gate_proj = linear(width, intermediate, precision, rngs)
        self.up_proj = linear(width, intermediate, precision, rngs)
        self.down_proj = linear(intermediate, width, precision, rngs)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
