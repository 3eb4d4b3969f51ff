"""From logits to tokens: greedy, temperature, nucleus (top-p, arXiv 1904.09751).

Shape letters: B rows, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


def nucleus(logits_BV: Float[Array, "B V"], top_p: float) -> Bool[Array, "B V"]:
    """The fewest most probable tokens whose probability is at least top_p together; never none."""
    probs_BV = jax.nn.softmax(logits_BV, axis=-1)
    order_BV = jnp.argsort(-probs_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(probs_BV, order_BV, axis=-1)
    before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
    kept_BV = (before_BV < top_p).at[:, 0].set(True)
    return jax.vmap(lambda order, kept: jnp.zeros_like(kept).at[order].set(kept))(order_BV, kept_BV)


def sample(
    logits_BV: Float[Array, "B V"], keys_B: Key[Array, " B"], temperature: float, top_p: float = 1.0
) -> Int[Array, " B"]:
    """One token a row, each row by its own key; temperature 0 is greedy."""
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV.astype(jnp.float32) / temperature
    if top_p < 1:
        logits_BV = jnp.where(nucleus(logits_BV, top_p), logits_BV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
