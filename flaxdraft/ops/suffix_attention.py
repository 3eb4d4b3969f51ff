"""Suffix attention: the attention of the test-time-training unroll (EAGLE-3, arXiv 2503.01840).

At step j a row attends to the step-0 keys of all rows before it (causal, one document) and, of its own row only,
to the keys of steps 1..j:   softmax over [q.k_0 visible | q.k_1 | ... | q.k_j], the last j terms diagonal.

Shape letters: B batch, R query rows, T key rows of step 0, N query heads, K key/value heads, H query/key width,
C value width, I suffix steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flaxdraft.ops.attention import MASKED, grouped_scores


def dense(
    q_BRNH: Float[Array, "B R N H"],
    k0_BTKH: Float[Array, "B T K H"],
    v0_BTKC: Float[Array, "B T K C"],
    suffix_k: Sequence[Float[Array, "B R K H"]],
    suffix_v: Sequence[Float[Array, "B R K C"]],
    visible_BRT: Bool[Array, "B R T"],
    scale: float,
) -> Float[Array, "B R N C"]:
    """The reference: builds the [R, T + I] scores. Softmax and sums are at least float32."""
    scores = jnp.where(visible_BRT[:, None, None], grouped_scores(q_BRNH, k0_BTKH, scale), MASKED)
    num_keys = k0_BTKH.shape[1]
    q_BRKGH = q_BRNH.reshape(*q_BRNH.shape[:2], k0_BTKH.shape[2], -1, q_BRNH.shape[-1])
    own = [jnp.einsum("brkgh,brkh->bkgr", q_BRKGH, k, preferred_element_type=scores.dtype) * scale for k in suffix_k]
    weights = jax.nn.softmax(jnp.concatenate([scores, *(s[..., None] for s in own)], axis=-1), axis=-1)
    weights = weights.astype(v0_BTKC.dtype)
    out = jnp.einsum("bkgrt,btkc->brkgc", weights[..., :num_keys], v0_BTKC)
    for i, v in enumerate(suffix_v):
        out = out + jnp.einsum("bkgr,brkc->brkgc", weights[..., num_keys + i], v)
    return out.reshape(*q_BRNH.shape[:3], v0_BTKC.shape[-1])
