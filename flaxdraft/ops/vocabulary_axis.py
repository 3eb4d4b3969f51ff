"""Reductions over a vocabulary that may be split over devices, for use inside a device (`devices/per_device.py`).

`axis` is the mesh axis that splits the vocabulary, None where it is whole. Every function gives the same number on all
devices of the axis.

Shape letters: C rows, W a device's part of the vocabulary, K tokens of it.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def total(x: Float[Array, "*shape"], axis: str | None) -> Float[Array, "*shape"]:
    """The sum of the devices' parts. What follows must be the same on every device (else see `_shared`): each part's
    gradient is then that of the sum, and nothing is added up on the way back."""
    return x if axis is None else _total(x, axis)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _total(x, axis):
    return lax.psum(x, axis)


_total.defvjp(lambda x, axis: (_total(x, axis), None), lambda axis, _, cotangent: (cotangent,))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _shared(x: jax.Array, axis: str) -> jax.Array:
    """A number that is the same on every device, for use in what each makes of its own part: those uses add up."""
    return x


_shared.defvjp(lambda x, axis: (x, None), lambda axis, _, cotangent: (lax.psum(cotangent, axis),))


def logsumexp(logits_CW: Float[Array, "C W"], axis: str | None) -> Float[Array, " C"]:
    """Over the whole vocabulary."""
    if axis is None:
        return jax.nn.logsumexp(logits_CW, axis=-1)
    peak_C = highest(lax.stop_gradient(logits_CW), axis)
    return peak_C + jnp.log(total(jnp.sum(jnp.exp(logits_CW - peak_C[:, None]), axis=-1), axis))


def softmax(logits_CW: Float[Array, "C W"], axis: str | None) -> Float[Array, "C W"]:
    """This device's part of the probabilities."""
    if axis is None:
        return jax.nn.softmax(logits_CW, axis=-1)
    # JAX types a custom_vjp that has options as giving anything.
    logsumexp_C = cast(Array, _shared(logsumexp(logits_CW, axis), axis))
    return jnp.exp(logits_CW - logsumexp_C[:, None])


def highest(logits_CW: Float[Array, "C W"], axis: str | None) -> Float[Array, " C"]:
    """The highest logit of the whole vocabulary."""
    top_C = jnp.max(logits_CW, axis=-1)
    return top_C if axis is None else lax.pmax(top_C, axis)


def first_at(logits_CW: Float[Array, "C W"], value_C: Float[Array, " C"], axis: str | None) -> Int[Array, " C"]:
    """The lowest id whose logit is that value, which some id has: argmax, given the maximum. An ordinary minimum, which
    compilers make in one pass with other sums; a reduction that carries an index along is not."""
    own_W = jnp.arange(logits_CW.shape[-1], dtype=jnp.int32)
    if axis is not None:
        own_W = own_W + lax.axis_index(axis) * logits_CW.shape[-1]
    there_CW = jnp.where(logits_CW == value_C[:, None], own_W[None], jnp.iinfo(jnp.int32).max)
    first_C = jnp.min(there_CW, axis=-1)
    return first_C if axis is None else lax.pmin(first_C, axis)


def at(logits_CW: Float[Array, "C W"], id_C: Int[Array, " C"], axis: str | None) -> Float[Array, " C"]:
    """The logit of one id a row."""
    if axis is None:
        return jnp.take_along_axis(logits_CW, id_C[:, None], axis=-1)[:, 0]
    own_C = id_C - lax.axis_index(axis) * logits_CW.shape[-1]
    inside_C = (own_C >= 0) & (own_C < logits_CW.shape[-1])
    found_C = jnp.take_along_axis(logits_CW, jnp.where(inside_C, own_C, 0)[:, None], axis=-1)[:, 0]
    return total(jnp.where(inside_C, found_C, 0.0), axis)


def top(
    logits_CW: Float[Array, "C W"], count: int, axis: str | None
) -> tuple[Float[Array, "C K"], Int[Array, "C K"]]:  # fmt: skip
    """The `count` highest logits of each row, falling, and their ids; of equal ones the lower id comes first."""
    value_CK, id_CK = lax.top_k(logits_CW, min(count, logits_CW.shape[-1]))
    if axis is None:
        return value_CK, id_CK
    id_CK = id_CK + lax.axis_index(axis) * logits_CW.shape[-1]
    # In the order of the devices, hence of the ids.
    values, ids = (lax.all_gather(x, axis, axis=1, tiled=True) for x in (value_CK, id_CK))
    value_CK, at_CK = lax.top_k(values, count)
    return value_CK, jnp.take_along_axis(ids, at_CK, axis=1)
