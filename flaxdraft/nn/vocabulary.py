"""Embedding lookup and full-vocabulary statistics, the vocabulary split over devices where the sharding says so.

Shape letters: B batch, T time, E width, V vocabulary, M = B T rows, C rows of a chunk.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import P, lax
from jaxtyping import Array, Float, Int

from flaxdraft.devices.mesh import TENSOR_AXIS
from flaxdraft.devices.per_device import on_shards, per_device
from flaxdraft.devices.sharding import Sharding, axes_of, gathered, spec_of
from flaxdraft.ops.vocabulary_axis import total

LOGITS_AT_ONCE = 2**26  # of one device; more are made in chunks of rows


def lookup(table_VE: Float[Array, "V E"], tokens_BT: Int[Array, "B T"], sharding: Sharding) -> Float[Array, "B T E"]:
    """Rows of the table, wherever its pieces are: no piece moves. Where the vocabulary is split, each device looks up
    what it holds and one sum puts rows together; where the width is split over fsdp, each device looks its columns up
    for the batches of the whole group, and gives everyone theirs."""
    if sharding.act_btd is None:
        return table_VE[tokens_BT]
    mesh, spec, tokens_spec = jax.sharding.get_abstract_mesh(), spec_of(table_VE), spec_of(tokens_BT).partitions
    vocabulary, width = (axis if axis and mesh.shape[axis] > 1 else None for axis in spec.partitions)

    def local(table, tokens):
        if width is not None:
            tokens = lax.all_gather(tokens, width, tiled=True)
        if vocabulary is None:
            found = table[tokens]
        else:
            own = tokens - lax.axis_index(vocabulary) * table.shape[0]
            inside = (own >= 0) & (own < table.shape[0])
            found = total(jnp.where(inside[..., None], table[jnp.where(inside, own, 0)], 0), vocabulary)
        return found if width is None else lax.all_to_all(found, width, 0, 2, tiled=True)

    out_spec = P(*tokens_spec, None, reduced=spec.reduced - axes_of(tokens_spec))
    return per_device(local, out_spec, table_VE, tokens_BT)


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
