"""Embedding lookup and full-vocabulary statistics, the vocabulary split over devices where the sharding says so.

Shape letters: B batch, T time, E width, V vocabulary, M = B T rows, C rows of a chunk.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import P, lax
from jaxtyping import Array, Float, Int

from flaxdraft.mesh import TENSOR_AXIS, Sharding, gathered, on_shards

LOGITS_AT_ONCE = 2**26  # of one device; more are made in chunks of rows


def lookup(table_VE: Float[Array, "V E"], tokens_BT: Int[Array, "B T"], sharding: Sharding) -> Float[Array, "B T E"]:
    """Rows of the table. Each device looks up what it holds; one sum puts them together."""
    if sharding.cache_lbn is None:
        return table_VE[tokens_BT]

    def local(table, tokens):
        own = tokens - lax.axis_index(TENSOR_AXIS) * table.shape[0]
        inside = (own >= 0) & (own < table.shape[0])
        found = jnp.where(inside[..., None], table[jnp.where(inside, own, 0)], 0)
        return lax.psum(found, TENSOR_AXIS)

    in_specs = (P(TENSOR_AXIS, None), P(*sharding.act_btd[:2]))
    return on_shards(sharding, local, in_specs, sharding.act_btd)(gathered(table_VE, sharding.weight_ve), tokens_BT)


def first_highest(logits_CV: Float[Array, "C V"]) -> tuple[Int[Array, " C"], Float[Array, " C"]]:
    """argmax and max of each row. The maximum of blocks comes first, since a reduction that carries an index is many
    times slower on CPUs than one that does not."""
    num_rows, vocab_size = logits_CV.shape
    width = next(w for w in range(math.isqrt(vocab_size), 0, -1) if vocab_size % w == 0)
    blocks = logits_CV.reshape(num_rows, -1, width)
    top_of_block = jnp.max(blocks, axis=-1)
    block_C = jnp.argmax(top_of_block, axis=-1)
    inside_C = jnp.argmax(jnp.take_along_axis(blocks, block_C[:, None, None], axis=1)[:, 0], axis=-1)
    return (block_C * width + inside_C).astype(jnp.int32), jnp.max(top_of_block, axis=-1)


def statistics(
    last_BTE: Float[Array, "B T E"], head_VE: Float[Array, "V E"], sharding: Sharding
) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """argmax and logsumexp of last @ head.T, at least in float32, the logits of a few rows at a time."""

    def local(last_BTE, head_VE):
        rows = last_BTE.reshape(-1, last_BTE.shape[-1])
        size = max(LOGITS_AT_ONCE // head_VE.shape[0], 1)
        if len(rows) <= size:
            argmax, logsumexp = of_rows(rows, head_VE)
        else:
            chunks = jnp.pad(rows, ((0, -len(rows) % size), (0, 0))).reshape(-1, size, rows.shape[-1])
            argmax, logsumexp = lax.map(lambda chunk: of_rows(chunk, head_VE), chunks)
        take = lambda x: x.reshape(-1)[: len(rows)].reshape(last_BTE.shape[:2])  # noqa: E731
        return take(argmax), take(logsumexp)

    def of_rows(rows_CE, head_VE):
        wide = jnp.promote_types(rows_CE.dtype, jnp.float32)
        logits_CV = jnp.einsum("ce,ve->cv", rows_CE, head_VE, preferred_element_type=wide)
        argmax, top = first_highest(logits_CV)
        logsumexp = jax.nn.logsumexp(logits_CV, axis=-1)
        if sharding.cache_lbn is None:
            return argmax, logsumexp
        # The lowest id among the devices that hold the highest logit, as argmax itself has it.
        highest = lax.pmax(top, TENSOR_AXIS)
        own = argmax + lax.axis_index(TENSOR_AXIS) * head_VE.shape[0]
        argmax = lax.pmin(jnp.where(top == highest, own, jnp.iinfo(jnp.int32).max), TENSOR_AXIS)
        peak = lax.pmax(logsumexp, TENSOR_AXIS)
        return argmax, peak + jnp.log(lax.psum(jnp.exp(logsumexp - peak), TENSOR_AXIS))

    rows = sharding.act_btd and P(*sharding.act_btd[:2])
    in_specs, head_VE = (sharding.act_btd, P(TENSOR_AXIS, None)), gathered(head_VE, sharding.weight_ve)
    return on_shards(sharding, local, in_specs, (rows, rows))(last_BTE, head_VE)
