"""From logits to tokens: greedy, temperature, nucleus (top-p, arXiv 1904.09751).

Shape letters: B rows, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


def nucleus(logits_BV: Float[Array, "*lead V"], top_p: float) -> Bool[Array, "*lead V"]:
    """The fewest most probable tokens whose probability is at least top_p together; never none."""
    probs_BV = jax.nn.softmax(logits_BV, axis=-1)
    order_BV = jnp.argsort(-probs_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(probs_BV, order_BV, axis=-1)
    before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
    kept_BV = (before_BV < top_p).at[..., 0].set(True)
    return jnp.put_along_axis(jnp.zeros_like(kept_BV), order_BV, kept_BV, axis=-1, inplace=False)


def sharpened(
    logits_BV: Float[Array, "*lead V"], temperature: float | Float[Array, "*broadcast"], top_p: float = 1.0
) -> Float[Array, "*lead V"]:
    """The logits, at least float32, of the distribution that is sampled.

    Args:
        temperature: above 0; an array broadcasts against the logits.
    """
    logits_BV = logits_BV.astype(jnp.promote_types(logits_BV.dtype, jnp.float32)) / temperature
    return jnp.where(nucleus(logits_BV, top_p), logits_BV, -jnp.inf) if top_p < 1 else logits_BV


def sample(
    logits_BV: Float[Array, "B V"], keys_B: Key[Array, " B"], temperature: float, top_p: float = 1.0
) -> Int[Array, " B"]:
    """One token a row, each row by its own key; temperature 0 is greedy."""
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return draw(sharpened(logits_BV, temperature, top_p), keys_B)


def draw(logits_BV: Float[Array, "B V"], keys_B: Key[Array, " B"]) -> Int[Array, " B"]:
    """One token a row from softmax(logits), each row by its own key."""
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
