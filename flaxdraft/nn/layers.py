"""The small blocks: projection, norm, gated feed-forward.

Precision and place are decided here and nowhere else. Kernels are stored [in, out]. Who makes a variable says where it
lives: `nnx.Param(value, place=...)` names a field of `Sharding`; see devices/weight_places.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P
from jaxtyping import Array, Float

from flaxdraft.devices.sharding import Sharding, along, gathered, into_columns, partitions_of, spec_of
from flaxdraft.nn.precision import Precision
from flaxdraft.ops.float8 import float8_product

WHOLE = Sharding.none()


class Frozen(nnx.Variable):
    """An array that travels with a module but is never trained."""


class Kept(nnx.Param):
    """A parameter that a draft is saved and exported with as it came: no gradient reaches it, no decay."""


class Split(NamedTuple):
    """How a projection is split over devices, as fields of `Sharding`."""

    kernel: str  # [in, out]
    bias: str
    result: str  # [B, T, out], batch and time as in the input (`along`)


COLUMN = Split("weight_df", "weight_f", "act_btf")
ROW = Split("weight_fd", "whole", "act_btd")
LATENT = Split("weight_dd", "whole", "act_btd")


class Linear(nnx.Module):
    """x @ kernel (+ bias), in compute precision."""

    def __init__(
        self, num_in: int, num_out: int, precision: Precision, rngs: nnx.Rngs, sharding: Sharding, split: Split, *,
        use_bias: bool = False,
    ):  # fmt: skip
        init = nnx.initializers.normal(0.02)
        self.precision = precision
        self.spec, self.out_spec = getattr(sharding, split.kernel), getattr(sharding, split.result)
        self.kernel = nnx.Param(init(rngs.params(), (num_in, num_out), precision.param), place=split.kernel)
        self.bias = nnx.Param(jnp.zeros((num_out,), precision.param), place=split.bias) if use_bias else None

    def __call__(self, x: Float[Array, "*lead I"], inputs: slice = slice(None)) -> Float[Array, "*lead O"]:
        """
        Args:
            inputs: which of the kernel's inputs x holds; the parts of an input may so be projected one by one.
        """
        kernel = gathered(self.kernel[...], self.spec)[inputs].astype(self.precision.compute)
        x, out_spec = x.astype(self.precision.compute), along(x, self.out_spec)
        # JAX types a custom_vjp that has options as giving anything.
        y = cast(Array, (float8_product if self.precision.float8 else _product)(x, kernel, out_spec))
        if self.bias is None:
            return y
        return y + jnp.expand_dims(self.bias[...].astype(y.dtype), tuple(range(y.ndim - 1)))


def _product(x: Float[Array, "*lead I"], kernel: Float[Array, "I O"], out_spec: P | None) -> Float[Array, "*lead O"]:
    """x @ kernel; on one device with batch and time as one axis: the kernel's gradient is then a product of two
    matrices. Summed over two axes, XLA's CPU code copies x into another order first, which takes as long as the
    product. Over several devices batch and time lie apart and stay two axes."""
    if x.ndim != 3 or jax.sharding.get_abstract_mesh().size > 1:
        return jnp.einsum("...i,io->...o", x, kernel, out_sharding=out_spec)
    spec, rows_spec, flat_spec = spec_of(x), None, None
    if out_spec is not None:
        rows_spec = P(*partitions_of(spec)[::2], reduced=spec.reduced)
        flat_spec = P(*partitions_of(out_spec)[::2])
    rows = jnp.reshape(x, (-1, x.shape[2]), out_sharding=rows_spec)
    flat = jnp.einsum("mi,io->mo", rows, kernel, out_sharding=flat_spec)
    return jnp.reshape(flat, (*x.shape[:2], kernel.shape[1]), out_sharding=out_spec)


def latent(num_in: int, num_out: int, precision: Precision, rngs: nnx.Rngs, s: Sharding, *, use_bias=False) -> Linear:
    """A projection to what all heads share: not split by tensor, only kept in pieces."""
    return Linear(num_in, num_out, precision, rngs, s, LATENT, use_bias=use_bias)


def column(num_in: int, num_out: int, precision: Precision, rngs: nnx.Rngs, s: Sharding, *, use_bias=False) -> Linear:
    """A projection whose outputs (heads, feed-forward) are split over devices."""
    return Linear(num_in, num_out, precision, rngs, s, COLUMN, use_bias=use_bias)


def row(num_in: int, num_out: int, precision: Precision, rngs: nnx.Rngs, s: Sharding, *, use_bias=False) -> Linear:
    """The projection back, whose inputs are split: one sum over devices."""
    return Linear(num_in, num_out, precision, rngs, s, ROW, use_bias=use_bias)


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + scale), statistics in float32 (float64 where the input is)."""

    def __init__(self, width: int, eps: float, precision: Precision, offset: float = 0.0):
        """
        Args:
            offset: 1 where scales are stored less one (Gemma).
        """
        self.eps, self.offset = eps, offset
        self.precision = precision
        self.scale = nnx.Param(jnp.ones((width,), precision.param), place="whole")

    def __call__(self, x: Float[Array, "*lead width"]) -> Float[Array, "*lead width"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        scale = jnp.expand_dims(self.scale[...], tuple(range(x.ndim - 1)))
        if self.offset:
            scale = scale.astype(wide.dtype) + self.offset
        return (normed * scale).astype(self.precision.compute)


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(
        self, width: int, intermediate: int, precision: Precision, rngs: nnx.Rngs, sharding: Sharding = WHOLE, *,
        use_bias: bool = False, activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
    ):  # fmt: skip
        self.activation = activation
        shared = {"precision": precision, "rngs": rngs, "s": sharding, "use_bias": use_bias}
        self.gate_proj = column(width, intermediate, **shared)
        self.up_proj = column(width, intermediate, **shared)
        self.down_proj = row(intermediate, width, **shared)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x_BTD = into_columns(x_BTD, self.up_proj.out_spec)
        return self.down_proj(self.activation(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
