"""Attention of every query to one range of keys, in chunks: memory linear in length, on any device.

Row r sees the keys first[r]..last[r], both included (causal attention inside a document: its start, and the row's own
place). The forward returns output and logsumexp, so that a softmax over more keys can be
merged in; the backward takes the *merged* output and logsumexp and then gives the gradients of the joint softmax.
This is FlashAttention (arXiv 2205.14135, 2307.08691) written in JAX: an online softmax over key chunks inside a loop
over query chunks, each visiting only the key chunks that one of its rows sees.

Shape letters: B batch, R query rows, T key rows, N query heads, K key/value heads (G = N / K share one), H query/key
width, C value width, P query chunks, X rows of one, Y keys of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from flaxdraft.ops.attention import MASKED, KeyRange

DEFAULT_CHUNK = 256
# Below every true score and far above a masked one: exp(masked - FLOOR) is 0, also in rows that see nothing.
FLOOR = MASKED / 10


class Chunks(NamedTuple):
    """Rows of a query chunk and of a key chunk; they bound the scores that exist at a time."""

    query: int = DEFAULT_CHUNK
    key: int = DEFAULT_CHUNK


class Joint(NamedTuple):
    """Results of the joint softmax, whatever other keys it has."""

    out_BRNC: Float[Array, "B R N C"]
    logsumexp_BRN: Float[Array, "B R N"]


class _Plan(NamedTuple):
    """Queries cut into chunks, keys padded to whole ones."""

    q_PBKGXH: jax.Array
    first_PBX: jax.Array
    last_PBX: jax.Array
    k_BKTH: jax.Array
    v_BKTC: jax.Array
    begin_P: jax.Array  # first key chunk that a query chunk visits
    end_P: jax.Array  # one past the last


def _wide(dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _pad_rows(x: jax.Array, multiple: int, value=0) -> jax.Array:
    missing = -x.shape[1] % multiple
    return jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)], constant_values=value)


def _cut(x_BR: jax.Array, size: int, value=0) -> jax.Array:
    """[B, R, ...] -> [P, B, X, ...]."""
    x = _pad_rows(x_BR, size, value)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _cut_heads(x_BRN: jax.Array, kv_heads: int, size: int) -> jax.Array:
    """[B, R, N, ...] -> [P, B, K, G, X, ...]: heads before rows, so that no product of a chunk moves its operands."""
    x_PBXN = _cut(x_BRN, size)
    return jnp.moveaxis(x_PBXN.reshape(*x_PBXN.shape[:3], kv_heads, -1, *x_PBXN.shape[4:]), 2, 4)


def _join_heads(x_PBKGX: jax.Array, num_rows: int) -> jax.Array:
    """The inverse of `_cut_heads`."""
    x = jnp.moveaxis(x_PBKGX, (0, 4), (1, 2))  # [B, P, X, K, G, ...]
    num_batch, num_chunks, size, kv_heads, group = x.shape[:5]
    return x.reshape(num_batch, num_chunks * size, kv_heads * group, *x.shape[5:])[:, :num_rows]


def _plan(q_BRNH, k_BTKH, v_BTKC, seen: KeyRange, chunks: Chunks) -> _Plan:
    first, last = _cut(seen.first_BR, chunks.query, 1), _cut(seen.last_BR, chunks.query, 0)
    sees = first <= last
    none = jnp.iinfo(jnp.int32).max
    begin = jnp.min(jnp.where(sees, first, none), axis=(1, 2)) // chunks.key
    end = jnp.max(jnp.where(sees, last, -1), axis=(1, 2)) // chunks.key + 1
    keys, values = (jnp.swapaxes(_pad_rows(x, chunks.key), 1, 2) for x in (k_BTKH, v_BTKC))
    return _Plan(_cut_heads(q_BRNH, k_BTKH.shape[2], chunks.query), first, last, keys, values, begin, end)


def _key_chunk(plan: _Plan, i, size: int) -> tuple[jax.Array, jax.Array]:
    """Keys [B, K, Y, H] and values [B, K, Y, C] of chunk `i`."""
    k_BKYH, v_BKYC = (lax.dynamic_slice_in_dim(x, i * size, size, axis=2) for x in (plan.k_BKTH, plan.v_BKTC))
    return k_BKYH, v_BKYC


def _scores(q_BKGXH, k_BKYH, first_BX, last_BX, start, scale):
    """Masked scores [B, K, G, X, Y] of one pair of chunks; keys begin at row `start`."""
    wide = _wide(q_BKGXH.dtype)
    scores = jnp.einsum("bkgxh,bkyh->bkgxy", q_BKGXH, k_BKYH, preferred_element_type=wide) * scale
    at_Y = start + jnp.arange(k_BKYH.shape[2])
    seen_BXY = (first_BX[:, :, None] <= at_Y[None, None]) & (at_Y[None, None] <= last_BX[:, :, None])
    # Added, not selected: XLA's CPU code for the softmax behind it is then a third faster.
    return scores + jnp.where(seen_BXY, 0.0, MASKED).astype(wide)[:, None, None]


def forward(
    q_BRNH: Float[Array, "B R N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKC: Float[Array, "B T K C"],
    seen: KeyRange,
    scale: float,
    chunks: Chunks,
) -> tuple[Float[Array, "B R N C"], Float[Array, "B R N"]]:
    """Output and logsumexp of the scaled scores, at least float32. A row that sees nothing gives 0 and MASKED."""
    plan = _plan(q_BRNH, k_BTKH, v_BTKC, seen, chunks)
    wide, size = _wide(q_BRNH.dtype), chunks.key

    def chunk(part):
        q_BKGXH, first_BX, last_BX, begin, end = part

        def visit(i, carry):
            top, total, out = carry
            k_BKYH, v_BKYC = _key_chunk(plan, i, size)
            scores = _scores(q_BKGXH, k_BKYH, first_BX, last_BX, i * size, scale)
            higher = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - higher[..., None])
            shrink = jnp.exp(top - higher)
            gained = jnp.einsum("bkgxy,bkyc->bkgxc", weights.astype(v_BKYC.dtype), v_BKYC, preferred_element_type=wide)
            return higher, total * shrink + weights.sum(-1), out * shrink[..., None] + gained

        shape = q_BKGXH.shape[:-1]
        empty = jnp.full(shape, FLOOR, wide), jnp.zeros(shape, wide), jnp.zeros((*shape, v_BTKC.shape[-1]), wide)
        top, total, out = lax.fori_loop(begin, end, visit, empty)
        out = out / jnp.where(total > 0, total, 1.0)[..., None]
        return out, jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), MASKED)

    parts = lax.map(chunk, (plan.q_PBKGXH, plan.first_PBX, plan.last_PBX, plan.begin_P, plan.end_P))
    out_BRNC, logsumexp_BRN = (_join_heads(x, q_BRNH.shape[1]) for x in parts)
    return out_BRNC, logsumexp_BRN


def backward(
    q_BRNH: Float[Array, "B R N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKC: Float[Array, "B T K C"],
    seen: KeyRange,
    joint: Joint,
    grad_BRNC: Float[Array, "B R N C"],
    scale: float,
    chunks: Chunks,
) -> tuple[Float[Array, "B R N H"], Float[Array, "B T K H"], Float[Array, "B T K C"]]:
    """Gradients of q, k, v, at least float32, from that of the joint output."""
    plan = _plan(q_BRNH, k_BTKH, v_BTKC, seen, chunks)
    wide, size = _wide(q_BRNH.dtype), chunks.key
    delta_BRN = jnp.sum(grad_BRNC.astype(wide) * joint.out_BRNC.astype(wide), axis=-1)
    per_row = [_cut_heads(x, k_BTKH.shape[2], chunks.query) for x in (joint.logsumexp_BRN, delta_BRN, grad_BRNC)]

    def chunk(carry, part):
        q_BKGXH, first_BX, last_BX, begin, end, logsumexp_BKGX, delta_BKGX, grad_BKGXC = part
        logsumexp, delta = jnp.maximum(logsumexp_BKGX, FLOOR)[..., None], delta_BKGX[..., None]

        def visit(i, carry):
            dq, dk, dv = carry
            k_BKYH, v_BKYC = _key_chunk(plan, i, size)
            weights = jnp.exp(_scores(q_BKGXH, k_BKYH, first_BX, last_BX, i * size, scale) - logsumexp)
            toward = jnp.einsum("bkgxc,bkyc->bkgxy", grad_BKGXC, v_BKYC, preferred_element_type=wide)
            dscores = (weights * (toward - delta) * scale).astype(q_BKGXH.dtype)
            dq = dq + jnp.einsum("bkgxy,bkyh->bkgxh", dscores, k_BKYH, preferred_element_type=wide)
            dk_BKYH = jnp.einsum("bkgxy,bkgxh->bkyh", dscores, q_BKGXH, preferred_element_type=wide)
            weights = weights.astype(grad_BKGXC.dtype)
            dv_BKYC = jnp.einsum("bkgxy,bkgxc->bkyc", weights, grad_BKGXC, preferred_element_type=wide)
            return dq, _add_rows(dk, dk_BKYH, i * size), _add_rows(dv, dv_BKYC, i * size)

        dq, dk, dv = lax.fori_loop(begin, end, visit, (jnp.zeros(q_BKGXH.shape, wide), *carry))
        return (dk, dv), dq

    empty = jnp.zeros(plan.k_BKTH.shape, wide), jnp.zeros(plan.v_BKTC.shape, wide)
    parts = plan.q_PBKGXH, plan.first_PBX, plan.last_PBX, plan.begin_P, plan.end_P, *per_row
    (dk, dv), dq = lax.scan(chunk, empty, parts)
    dk_BTKH, dv_BTKC = (jnp.swapaxes(x, 1, 2)[:, : k_BTKH.shape[1]] for x in (dk, dv))
    return _join_heads(dq, q_BRNH.shape[1]), dk_BTKH, dv_BTKC


def _add_rows(x_BKT: jax.Array, more_BKY: jax.Array, start) -> jax.Array:
    there = lax.dynamic_slice_in_dim(x_BKT, start, more_BKY.shape[2], axis=2)
    return lax.dynamic_update_slice_in_dim(x_BKT, there + more_BKY, start, axis=2)
