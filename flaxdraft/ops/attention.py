"""Plain attention over an explicit visibility mask; for short rows and cached decoding.

Shape letters: B batch, T query rows (R where they are some of a row), S key rows, N query heads, K key/value heads
(G = N / K share one), H query/key width, C value width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Large and finite: a row that sees nothing (padding) gets some average instead of NaN.
MASKED = -1e30


def grouped_scores(
    q_BTNH: Float[Array, "B T N H"], k_BSKH: Float[Array, "B S K H"], scale: float
) -> Float[Array, "B K G T S"]:
    """Scaled products of queries with keys, at least float32."""
    q_BTKGH = q_BTNH.reshape(*q_BTNH.shape[:2], k_BSKH.shape[2], -1, q_BTNH.shape[-1])
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    return jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=wide) * scale


def _weights(scores_BKGTS, sinks_N):
    """Softmax over the keys, and over a sink that takes its share and is left out."""
    if sinks_N is None:
        return jax.nn.softmax(scores_BKGTS, axis=-1)
    sinks_1KG11 = sinks_N.astype(scores_BKGTS.dtype).reshape(1, *scores_BKGTS.shape[1:3], 1, 1)
    sinks_BKGT1 = jnp.broadcast_to(sinks_1KG11, (*scores_BKGTS.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([scores_BKGTS, sinks_BKGT1], axis=-1), axis=-1)[..., :-1]


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKC: Float[Array, "B S K C"],
    visible_BTS: Bool[Array, "B T S"],
    scale: float,
    sinks_N: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N C"]:
    """softmax(scale q.k over the visible keys) v; sinks are scores of each head that have no value."""
    scores = jnp.where(visible_BTS[:, None, None], grouped_scores(q_BTNH, k_BSKH, scale), MASKED)
    weights = _weights(scores, sinks_N).astype(v_BSKC.dtype)
    out = jnp.einsum("bkgts,bskc->btkgc", weights, v_BSKC)
    return out.reshape(*q_BTNH.shape[:3], v_BSKC.shape[-1])


def attend_cache(
    q_BTNH: Float[Array, "B T N H"],
    k_BKHS: Float[Array, "B K H S"],
    v_BKSC: Float[Array, "B K S C"],
    visible_BTS: Bool[Array, "B T S"],
    scale: float,
    sinks_N: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N C"]:
    """`attend` over a cache, which keeps keys with the slots last.

    A single query row is a matrix-vector product for each head: written as multiply and reduce it reads the cache
    once at memory speed, while XLA's batched product on CPU takes 1.6 times as long. Elsewhere values are still
    multiplied and summed, but scores are a batched product: keys have their slots last, and XLA would first copy them
    into another order.
    """
    heads, single = k_BKHS.shape[1], q_BTNH.shape[1] == 1
    q_BTKGH = q_BTNH.reshape(*q_BTNH.shape[:2], heads, -1, q_BTNH.shape[-1])
    if single and jax.default_backend() == "cpu":
        q_BKGH = q_BTKGH[:, 0]
        scores = jnp.sum(k_BKHS[:, :, None] * q_BKGH[..., None], axis=3)[..., None, :] * scale
    else:
        scores = jnp.einsum("btkgh,bkhs->bkgts", q_BTKGH, k_BKHS) * scale
    scores = jnp.where(visible_BTS[:, None, None], scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), MASKED)
    weights = _weights(scores, sinks_N).astype(v_BKSC.dtype)
    if single:
        out = jnp.sum(v_BKSC[:, :, None] * weights[:, :, :, 0, :, None], axis=3)[:, None]
    else:
        out = jnp.einsum("bkgts,bksc->btkgc", weights, v_BKSC)
    return out.reshape(*q_BTNH.shape[:3], v_BKSC.shape[-1])


def causal_visibility(segments_BT: jax.Array) -> Bool[Array, "B T T"]:
    """Row t sees row s iff s <= t and both are of one document (segment ids; 0 is padding and sees nothing)."""
    num = segments_BT.shape[1]
    causal = jnp.tril(jnp.ones((num, num), bool))
    same = (segments_BT[:, :, None] == segments_BT[:, None, :]) & (segments_BT > 0)[:, :, None]
    return causal[None] & same


class KeyRange(NamedTuple):
    """The key rows that each query row sees, the first and the last included; last < first sees none."""

    first_BR: Int[Array, "B R"]
    last_BR: Int[Array, "B R"]


def document_ranges(segments_BT: Int[Array, "B T"]) -> KeyRange:
    """What each row of packed documents sees: from its document's start to itself. Padding (0) sees nothing.

    A document is a run of equal segment ids.
    """
    at_T = jnp.arange(segments_BT.shape[1])[None]
    before_BT = jnp.pad(segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    first_BT = jax.lax.cummax(jnp.where(segments_BT != before_BT, at_T, 0), axis=1)
    return KeyRange(first_BT, jnp.where(segments_BT > 0, at_T, -1))
