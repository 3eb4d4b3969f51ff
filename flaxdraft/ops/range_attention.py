"""Attention of every query to one range of keys, in chunks: memory linear in length, on any device.

Row r sees the keys first[r]..last[r], both included (causal attention inside a document: its start, and the row's own
place); last < first sees nothing. The forward returns output and logsumexp, so that a softmax over more keys can be
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
from jaxtyping import Array, Float, Int

from flaxdraft.ops.attention import MASKED

DEFAULT_CHUNK = 256


class Chunks(NamedTuple):
    """Rows of a query chunk and of a key chunk; they bound the scores that exist at a time."""

    query: int = DEFAULT_CHUNK
    key: int = DEFAULT_CHUNK


class _Plan(NamedTuple):
    """Queries cut into chunks, keys padded to whole ones."""

    q_PBXKGH: jax.Array
    first_PBX: jax.Array
    last_PBX: jax.Array
    k_BTKH: jax.Array
    v_BTKC: jax.Array
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


def _join(x_PBX: jax.Array, num_rows: int) -> jax.Array:
    """The inverse of `_cut`."""
    x = jnp.moveaxis(x_PBX, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :num_rows]


def _plan(q_BRNH, k_BTKH, v_BTKC, first_BR, last_BR, chunks: Chunks) -> _Plan:
    num_batch, num_rows, _, width = q_BRNH.shape
    q = q_BRNH.reshape(num_batch, num_rows, k_BTKH.shape[2], -1, width)
    first, last = _cut(first_BR, chunks.query, 1), _cut(last_BR, chunks.query, 0)
    sees = first <= last
    none = jnp.iinfo(jnp.int32).max
    begin = jnp.min(jnp.where(sees, first, none), axis=(1, 2)) // chunks.key
    end = jnp.max(jnp.where(sees, last, -1), axis=(1, 2)) // chunks.key + 1
    keys, values = _pad_rows(k_BTKH, chunks.key), _pad_rows(v_BTKC, chunks.key)
    return _Plan(_cut(q, chunks.query), first, last, keys, values, begin, end)


def _scores(q_BXKGH, k_BYKH, first_BX, last_BX, start, scale):
    """Masked scores [B, K, G, X, Y] of one pair of chunks; keys begin at row `start`."""
    wide = _wide(q_BXKGH.dtype)
    scores = jnp.einsum("bxkgh,bykh->bkgxy", q_BXKGH, k_BYKH, preferred_element_type=wide) * scale
    at_Y = start + jnp.arange(k_BYKH.shape[1])
    seen_BXY = (first_BX[:, :, None] <= at_Y[None, None]) & (at_Y[None, None] <= last_BX[:, :, None])
    return scores, seen_BXY[:, None, None]


def forward(
    q_BRNH: Float[Array, "B R N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKC: Float[Array, "B T K C"],
    first_BR: Int[Array, "B R"],
    last_BR: Int[Array, "B R"],
    scale: float,
    chunks: Chunks,
) -> tuple[Float[Array, "B R N C"], Float[Array, "B R N"]]:
    """Output and logsumexp of the scaled scores, at least float32. A row that sees nothing gives 0 and MASKED."""
    plan, (num_batch, num_rows, num_heads, _) = _plan(q_BRNH, k_BTKH, v_BTKC, first_BR, last_BR, chunks), q_BRNH.shape
    wide, size = _wide(q_BRNH.dtype), chunks.key

    def chunk(part):
        q_BXKGH, first_BX, last_BX, begin, end = part
        _, num_x, kv_heads, group, _ = q_BXKGH.shape

        def visit(i, carry):
            top, total, out = carry
            k_BYKH = lax.dynamic_slice_in_dim(plan.k_BTKH, i * size, size, axis=1)
            v_BYKC = lax.dynamic_slice_in_dim(plan.v_BTKC, i * size, size, axis=1)
            scores, seen = _scores(q_BXKGH, k_BYKH, first_BX, last_BX, i * size, scale)
            scores = jnp.where(seen, scores, MASKED)
            higher = jnp.maximum(top, scores.max(-1))
            # Where nothing is seen yet `higher` is MASKED too, and exp(0) must not count.
            weights = jnp.where(seen, jnp.exp(scores - higher[..., None]), 0.0)
            shrink = jnp.exp(top - higher)
            gained = jnp.einsum("bkgxy,bykc->bkgxc", weights.astype(v_BYKC.dtype), v_BYKC, preferred_element_type=wide)
            return higher, total * shrink + weights.sum(-1), out * shrink[..., None] + gained

        shape = (num_batch, kv_heads, group, num_x)
        empty = jnp.full(shape, MASKED, wide), jnp.zeros(shape, wide), jnp.zeros((*shape, v_BTKC.shape[-1]), wide)
        top, total, out = lax.fori_loop(begin, end, visit, empty)
        out = out / jnp.where(total > 0, total, 1.0)[..., None]
        logsumexp = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), MASKED)
        # [B, K, G, X, ...] -> [B, X, N, ...]
        to_rows = lambda x: jnp.moveaxis(x, 3, 1).reshape(num_batch, num_x, num_heads, *x.shape[4:])  # noqa: E731
        return to_rows(out), to_rows(logsumexp)

    out, logsumexp = lax.map(chunk, (plan.q_PBXKGH, plan.first_PBX, plan.last_PBX, plan.begin_P, plan.end_P))
    return _join(out, num_rows), _join(logsumexp, num_rows)


def backward(
    q_BRNH: Float[Array, "B R N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKC: Float[Array, "B T K C"],
    first_BR: Int[Array, "B R"],
    last_BR: Int[Array, "B R"],
    out_BRNC: Float[Array, "B R N C"],
    logsumexp_BRN: Float[Array, "B R N"],
    grad_BRNC: Float[Array, "B R N C"],
    scale: float,
    chunks: Chunks,
) -> tuple[Float[Array, "B R N H"], Float[Array, "B T K H"], Float[Array, "B T K C"]]:
    """Gradients of q, k, v, at least float32.

    Args:
        out_BRNC, logsumexp_BRN: of the joint softmax, whatever other keys it has.
        grad_BRNC: the gradient of the joint output.
    """
    plan, (num_batch, num_rows, _, width) = _plan(q_BRNH, k_BTKH, v_BTKC, first_BR, last_BR, chunks), q_BRNH.shape
    wide, size, kv_heads = _wide(q_BRNH.dtype), chunks.key, k_BTKH.shape[2]
    by_group = lambda x: x.reshape(num_batch, num_rows, kv_heads, -1, *x.shape[3:])  # noqa: E731
    delta_BRN = jnp.sum(grad_BRNC.astype(wide) * out_BRNC.astype(wide), axis=-1)
    per_row = [_cut(by_group(x), chunks.query) for x in (logsumexp_BRN, delta_BRN, grad_BRNC)]

    def chunk(carry, part):
        q_BXKGH, first_BX, last_BX, begin, end, logsumexp_BXKG, delta_BXKG, grad_BXKGC = part
        to_heads = lambda x: jnp.moveaxis(x, 1, 3)  # noqa: E731 ([B, X, K, G] -> [B, K, G, X])
        logsumexp, delta = to_heads(logsumexp_BXKG)[..., None], to_heads(delta_BXKG)[..., None]

        def visit(i, carry):
            dq, dk, dv = carry
            k_BYKH = lax.dynamic_slice_in_dim(plan.k_BTKH, i * size, size, axis=1)
            v_BYKC = lax.dynamic_slice_in_dim(plan.v_BTKC, i * size, size, axis=1)
            scores, seen = _scores(q_BXKGH, k_BYKH, first_BX, last_BX, i * size, scale)
            weights = jnp.where(seen, jnp.exp(jnp.where(seen, scores, MASKED) - logsumexp), 0.0)
            toward = jnp.einsum("bxkgc,bykc->bkgxy", grad_BXKGC, v_BYKC, preferred_element_type=wide)
            dscores = (weights * (toward - delta) * scale).astype(q_BXKGH.dtype)
            dq = dq + jnp.einsum("bkgxy,bykh->bxkgh", dscores, k_BYKH, preferred_element_type=wide)
            dk_BYKH = jnp.einsum("bkgxy,bxkgh->bykh", dscores, q_BXKGH, preferred_element_type=wide)
            weights = weights.astype(grad_BXKGC.dtype)
            dv_BYKC = jnp.einsum("bkgxy,bxkgc->bykc", weights, grad_BXKGC, preferred_element_type=wide)
            return dq, _add_rows(dk, dk_BYKH, i * size), _add_rows(dv, dv_BYKC, i * size)

        dq, dk, dv = lax.fori_loop(begin, end, visit, (jnp.zeros(q_BXKGH.shape, wide), *carry))
        return (dk, dv), dq

    empty = jnp.zeros(plan.k_BTKH.shape, wide), jnp.zeros(plan.v_BTKC.shape, wide)
    parts = plan.q_PBXKGH, plan.first_PBX, plan.last_PBX, plan.begin_P, plan.end_P, *per_row
    (dk, dv), dq = lax.scan(chunk, empty, parts)
    num_keys = k_BTKH.shape[1]
    return _join(dq, num_rows).reshape(*q_BRNH.shape[:3], width), dk[:, :num_keys], dv[:, :num_keys]


def _add_rows(x: jax.Array, more: jax.Array, start) -> jax.Array:
    there = lax.dynamic_slice_in_dim(x, start, more.shape[1], axis=1)
    return lax.dynamic_update_slice_in_dim(x, there + more, start, axis=1)
