"""Attention of blocks: every slot sees a range of the text before its block, and slots of its own block.

One softmax over both. The text's keys are the same for all blocks and are seen by range, which the chunked kernel does
without ever holding [slots, text] scores; what is inside a block is small and is merged in log space:
L = logaddexp(L_text, L_block), O = exp(L_text - L) O_text + exp(s - L) v. The kernel's backward pass with the merged O
and L gives the gradients of the joint softmax. A head may have a sink: a score that takes its share of the softmax and
brings no value, for which L becomes logaddexp(L, sink).

Shape letters: B batch, A blocks, S slots of a block (Y where they are keys), R = A S query rows, T key rows of the
text, N query heads, K key/value heads (G = N / K share one), H query/key width, C value width.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from flaxdraft.devices.per_device import added_up, per_device
from flaxdraft.devices.sharding import axes_of, gradient_spec, spec_of
from flaxdraft.ops import range_attention
from flaxdraft.ops.attention import MASKED, KeyRange, grouped_scores
from flaxdraft.ops.range_attention import DEFAULT_CHUNK, Chunks, Joint
from flaxdraft.ops.remat import ATTENTION_OUTPUT

Backend = Literal["auto", "dense", "chunked"]
# Scores of one layer up to which building them whole is as fast.
DENSE_SCORES = 2**22


class Way(NamedTuple):
    """How the attention is computed; none of it changes the result beyond rounding.

    backend: "dense" builds the [R, T] scores; "chunked" never does: memory is linear in length.
    """

    backend: Backend = "auto"
    chunks: Chunks = Chunks(DEFAULT_CHUNK, DEFAULT_CHUNK)


@dataclasses.dataclass(frozen=True)
class Sight:
    """What a layer lets slots see.

    window: slot k sees what stands at most window - 1 places before it, itself among them; None: everything.
    """

    size: int  # of a block
    causal: bool  # in the block
    window: int | None

    def inside(self) -> np.ndarray:
        """bool [S, Y]: the slots of its own block that each slot sees."""
        ahead = np.arange(self.size)[None] - np.arange(self.size)[:, None]
        near = np.ones_like(ahead, bool) if self.window is None else ahead > -self.window
        return near & ((ahead <= 0) | (not self.causal))

    def text(self, anchor_BA: Int[Array, "B A"], first_BA: Int[Array, "B A"]) -> KeyRange:
        """The key rows of the text that each slot [B, R] sees: its document up to the anchor, which stands in the block
        and is not seen here.

        Args:
            anchor_BA: the key rows where blocks begin.
            first_BA: those where their documents do.
        """
        begin_BAS = jnp.broadcast_to(first_BA[:, :, None], (*first_BA.shape, self.size))
        if self.window is not None:
            oldest_BAS = anchor_BA[:, :, None] + jnp.arange(self.size)[None, None] - (self.window - 1)
            begin_BAS = jnp.maximum(begin_BAS, oldest_BAS)
        end_BAS = jnp.broadcast_to(anchor_BA[:, :, None] - 1, begin_BAS.shape)
        shape = anchor_BA.shape[0], anchor_BA.shape[1] * self.size
        return KeyRange(begin_BAS.reshape(shape), end_BAS.reshape(shape))


class Keys(NamedTuple):
    """Keys and values of the text or of the blocks."""

    k_BTKH: Float[Array, "B T K H"]
    v_BTKC: Float[Array, "B T K C"]


def choose(backend: Backend, num_queries: int, num_heads: int, num_keys: int) -> Backend:
    """The backend for arrays of these sizes: "auto" takes whole scores where they are few.

    Args:
        num_queries: of all batch rows.
    """
    if backend != "auto":
        return backend
    return "dense" if num_queries * num_heads * num_keys <= DENSE_SCORES else "chunked"


def block_attention(
    q_BRNH: Float[Array, "B R N H"], text: Keys, own: Keys, seen: KeyRange, sight: Sight, scale: float, way: Way,
    sink_N: Float[Array, " N"] | None = None,
) -> Float[Array, "B R N C"]:  # fmt: skip
    """One layer's attention.

    Args:
        seen: the rows of the text that each slot sees, see `Sight.text`.
        sink_N: of each head, where the draft has any.
    """
    num_batch, num_queries, num_heads, _ = q_BRNH.shape
    if choose(way.backend, num_batch * num_queries, num_heads, text.k_BTKH.shape[1]) == "dense":
        local = partial(dense, sight=sight, scale=scale)
        return per_device(local, spec_of(q_BRNH), q_BRNH, text, own, seen, sink_N)
    return merged(q_BRNH, text, own, seen, sink_N, sight, scale, way.chunks)


def dense(q_BRNH, text: Keys, own: Keys, seen: KeyRange, sink_N, sight: Sight, scale: float):
    """The reference: builds the [R, T + S] scores. Softmax and sums are at least float32."""
    num_keys, kv_heads = text.k_BTKH.shape[1:3]
    at_T = jnp.arange(num_keys)[None, None]
    visible_BRT = (seen.first_BR[:, :, None] <= at_T) & (at_T <= seen.last_BR[:, :, None])
    scores = jnp.where(visible_BRT[:, None, None], grouped_scores(q_BRNH, text.k_BTKH, scale), MASKED)
    inside = _own_scores(q_BRNH, own.k_BTKH, sight, scale)  # [B, A, S, K, G, Y]
    inside = inside.reshape(*q_BRNH.shape[:2], kv_heads, -1, sight.size)
    parts = [scores, jnp.moveaxis(inside, 1, 3)]  # [B, K, G, R, T] and [B, K, G, R, Y]
    if sink_N is not None:
        sink = sink_N.astype(scores.dtype).reshape(1, kv_heads, -1, 1, 1)
        parts.append(jnp.broadcast_to(sink, (*scores.shape[:-1], 1)))
    weights = jax.nn.softmax(jnp.concatenate(parts, axis=-1), axis=-1).astype(text.v_BTKC.dtype)
    out = jnp.einsum("bkgrt,btkc->brkgc", weights[..., :num_keys], text.v_BTKC)
    inside = jnp.moveaxis(weights[..., num_keys : num_keys + sight.size], 3, 1)
    inside = inside.reshape(inside.shape[0], -1, sight.size, *inside.shape[2:])
    out = out + jnp.einsum("baskgy,baykc->baskgc", inside, _blocks(own.v_BTKC, sight)).reshape(out.shape)
    return out.reshape(*q_BRNH.shape[:3], -1)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def merged(q_BRNH, text: Keys, own: Keys, seen: KeyRange, sink_N, sight: Sight, scale: float, chunks: Chunks):
    """The same without whole scores; the head of this file says how. Arguments are those of `block_attention`."""
    return _merged(q_BRNH, text, own, seen, sink_N, sight, scale, chunks)[0]


def _merged(q, text, own, seen, sink, sight, scale, chunks):
    def local(q, text, own, seen, sink):
        out, logsumexp = range_attention.forward(q, text.k_BTKH, text.v_BTKC, seen, scale, chunks)
        scores = _own_scores(q, own.k_BTKH, sight, scale)
        joint = jnp.logaddexp(logsumexp, jax.nn.logsumexp(scores, axis=-1).reshape(logsumexp.shape))
        if sink is not None:
            joint = jnp.logaddexp(joint, sink.astype(joint.dtype)[None, None])
        weights = jnp.exp(scores - joint.reshape(scores.shape[:-1])[..., None])
        inside = _out(weights.astype(own.v_BTKC.dtype), own.v_BTKC, sight, out.dtype)
        out = out * jnp.exp(logsumexp - joint)[..., None] + inside.reshape(out.shape)
        return out.astype(own.v_BTKC.dtype), joint

    out_specs = spec_of(q), jax.P(*spec_of(q).partitions[:3])
    return per_device(local, out_specs, q, text, own, seen, sink)


def _forward(q, text, own, seen, sink, sight, scale, chunks):
    out, logsumexp = _merged(q, text, own, seen, sink, sight, scale, chunks)
    out, logsumexp = checkpoint_name(out, ATTENTION_OUTPUT), checkpoint_name(logsumexp, ATTENTION_OUTPUT)
    return out, (q, text, own, sink, seen, Joint(out, logsumexp))


def _backward(sight, scale, chunks, residuals, grad):
    """Of what is inside a block, with p = exp(s - L): ds = p (dO.v - dO.O), dq += c ds k, dk = c ds q, dv = p dO; of a
    sink, which has no value, ds = -p dO.O."""
    rows_axes = axes_of(spec_of(residuals[0]).partitions)
    keys_spec, sink_spec = spec_of(residuals[1].k_BTKH), jax.P() if residuals[3] is None else spec_of(residuals[3])

    def local(q, text, own, sink, seen, joint, grad):
        wide = joint.logsumexp_BRN.dtype
        dq, *dtext = range_attention.backward(q, text.k_BTKH, text.v_BTKC, seen, joint, grad, scale, chunks)
        dtext = [added_up(x.astype(text.k_BTKH.dtype), keys_spec, rows_axes) for x in dtext]
        scores = _own_scores(q, own.k_BTKH, sight, scale)
        by_block = lambda x: x.reshape(*scores.shape[:-1], *x.shape[3:])  # noqa: E731
        delta_BRN = jnp.sum(grad.astype(wide) * joint.out_BRNC.astype(wide), axis=-1)
        weights = jnp.exp(scores - by_block(joint.logsumexp_BRN)[..., None])
        grad, q_blocks = by_block(grad), by_block(q)  # [B, A, S, K, G, ...]
        toward = jnp.einsum("baskgc,baykc->baskgy", grad, _blocks(own.v_BTKC, sight), preferred_element_type=wide)
        dscores = (weights * (toward - by_block(delta_BRN)[..., None]) * scale).astype(q.dtype)
        weights = weights.astype(q.dtype)
        sums = partial(jnp.einsum, preferred_element_type=wide)
        dq = dq + sums("baskgy,baykh->baskgh", dscores, _blocks(own.k_BTKH, sight)).reshape(dq.shape)
        dk = sums("baskgy,baskgh->baykh", dscores, q_blocks).reshape(own.k_BTKH.shape)
        dv = sums("baskgy,baskgc->baykc", weights, grad).reshape(own.v_BTKC.shape)
        dsink = None
        if sink is not None:
            shares_BRN = jnp.exp(sink.astype(wide)[None, None] - joint.logsumexp_BRN)
            dsink = added_up(-jnp.sum(shares_BRN * delta_BRN, axis=(0, 1)), sink_spec, rows_axes).astype(sink.dtype)
        return dq.astype(q.dtype), Keys(*dtext), Keys(dk.astype(q.dtype), dv.astype(q.dtype)), dsink

    out_specs = jax.tree.map(gradient_spec, residuals[:4])
    dq, dtext, down, dsink = per_device(local, out_specs, *residuals, grad)
    return dq, dtext, down, None, dsink


merged.defvjp(_forward, _backward)


def _blocks(x_BRKH, sight: Sight):
    """[B, R, ...] -> [B, A, S, ...]."""
    return x_BRKH.reshape(x_BRKH.shape[0], -1, sight.size, *x_BRKH.shape[2:])


def _own_scores(q_BRNH, k_BRKH, sight: Sight, scale: float):
    """[B, A, S, K, G, Y]: masked scores of each slot with the slots of its block, at least float32."""
    wide = jnp.promote_types(q_BRNH.dtype, jnp.float32)
    k_BAYKH, q_BASNH = _blocks(k_BRKH, sight), _blocks(q_BRNH, sight)
    q_BASKGH = q_BASNH.reshape(*q_BASNH.shape[:3], k_BRKH.shape[2], -1, q_BRNH.shape[-1])
    scores = jnp.einsum("baskgh,baykh->baskgy", q_BASKGH, k_BAYKH, preferred_element_type=wide) * scale
    return jnp.where(sight.inside()[None, None, :, None, None], scores, MASKED)


def _out(weights_BASKGY, v_BRKC, sight: Sight, wide):
    return jnp.einsum(
        "baskgy,baykc->baskgc", weights_BASKGY, _blocks(v_BRKC, sight), preferred_element_type=wide
    )  # fmt: skip
