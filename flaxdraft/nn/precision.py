"""What is fp32 and what may be narrower.

Master weights, optimizer moments, norm statistics, softmax, RoPE angles, losses and accumulators are always
float32; only the inputs of matrix products and the stored features follow these fields.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16, "float64": jnp.float64}


@dataclasses.dataclass(frozen=True)
class Precision:
    """compute: inputs of matrix products; param: master weights (float64 only in finite-difference tests); float8:
    whether products of [batch, time, width] round their inputs further, see ops/float8.py."""

    compute: jnp.dtype = jnp.float32
    param: jnp.dtype = jnp.float32
    float8: bool = False


def of_both(dtype: str) -> Precision:
    """Weights and products of one dtype, by its name."""
    return Precision(compute=DTYPES[dtype], param=DTYPES[dtype])
