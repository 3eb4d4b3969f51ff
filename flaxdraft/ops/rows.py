"""Some rows of a batch, taken and given back without a scatter.

Shape letters: B batch, T rows, R rows taken.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flaxdraft.devices.per_device import per_device
from flaxdraft.devices.sharding import spec_of


def take_rows(x: Float[Array, "B T *tail"], rows_BR: Int[Array, "B R"]) -> Float[Array, "B R *tail"]:
    """x at the rows of each batch entry; rows past the end read 0.

    The rows that lie inside are distinct (those past the end need not be), so each row of x has one reader at most and
    its gradient is read from there: a gather, where differentiation would add into memory, row by row.
    """
    spec = jax.P(*spec_of(rows_BR).partitions, *spec_of(x).partitions[2:])
    return per_device(_taken, spec, x, rows_BR)


def _take(x, rows_BR):
    return jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=0))(x, rows_BR)


_taken = jax.custom_vjp(_take)


def _forward(x, rows_BR):
    # An array without size tells the backward pass how many rows there were.
    return _take(x, rows_BR), (rows_BR, jnp.zeros((x.shape[1], 0)))


def _backward(residuals, grad):
    rows_BR, like = residuals
    num_rows, num_taken = like.shape[0], rows_BR.shape[1]
    nobody_T = jnp.full(num_rows, num_taken, jnp.int32)
    taken_R = jnp.arange(num_taken, dtype=jnp.int32)
    reader_BT = jax.vmap(lambda at: nobody_T.at[at].set(taken_R, mode="drop"))(rows_BR)
    return _take(grad, reader_BT), None


_taken.defvjp(_forward, _backward)
