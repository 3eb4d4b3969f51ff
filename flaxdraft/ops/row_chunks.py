"""Rows of a batch gone through some at a time, so that what is large for each row is never held for all of them.

Shape letters: B batch, R rows, M = B R, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool


def in_chunks(one: Callable[[Any], tuple[Any, Any]], size: int, asked_BR: Bool[Array, "B R"], rows: Any) -> Any:
    """Rows that are asked are compacted, in their order, and the loop runs ceil(n / size) times. For use inside a
    device (`devices/per_device.py`).

    Args:
        one: from some of the rows [C, ...] to what is known of each of them [C, ...], and sums over them. What fills
            the last chunk up is a row of zeros.
        size: C at most; a device that has fewer rows takes them all at once.
        rows: a pytree of arrays [B, R, ...].

    Returns:
        what is known of each row [B, R, ...], 0 where nothing is asked; the sums over all.
    """
    (num_batch, num_rows), asked_M = asked_BR.shape, asked_BR.ravel()
    total = num_batch * num_rows
    size = min(size, total)
    flat = jax.tree.map(lambda x: x.reshape(total, *x.shape[2:]), rows)
    # What fills the last chunk lies past the end.
    order, count = jnp.argsort(~asked_M, stable=True), jnp.sum(asked_M)
    order = jnp.pad(jnp.where(jnp.arange(total) < count, order, total), (0, size), constant_values=total)
    take = lambda x, at: x.at[at].get(mode="fill", fill_value=0)  # noqa: E731

    def walk(i, carry):
        known, sums = carry
        at_C = lax.dynamic_slice_in_dim(order, i * size, size)
        found, more = one(jax.tree.map(lambda x: take(x, at_C), flat))
        place = partial(lax.dynamic_update_slice_in_dim, start_index=i * size, axis=0)
        return jax.tree.map(place, known, found), jax.tree.map(jnp.add, sums, more)

    chunk = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), flat)
    known, sums = jax.eval_shape(one, chunk)
    # In the order of the walk, with room for the last chunk to be whole.
    known = jax.tree.map(lambda x: jnp.zeros((total + size, *x.shape[1:]), x.dtype), known)
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
    known, sums = lax.fori_loop(0, -(-count // size), walk, (known, sums))
    place_M = jnp.where(asked_M, jnp.cumsum(asked_M) - 1, total + size)
    return jax.tree.map(lambda x: take(x, place_M).reshape(num_batch, num_rows, *x.shape[1:]), known), sums
