"""Verifying sampled draft tokens so that what comes out is distributed as the target's own samples.

Leviathan et al., arXiv 2211.17192, algorithm 1: a draft token x is accepted with probability min(1, p(x) / q(x)); the
first one refused is replaced by a sample of max(0, p - q) / sum, and a chain accepted whole is followed by a sample of
the target's next distribution.

Shape letters: B rows, Q draft tokens, T = Q + 1 positions, V target vocabulary, W draft vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def residual(p_BV: Float[Array, "B V"], q_BV: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """max(0, p - q), whose normalised form replaces a refused token; not normalised here."""
    left_BV = jnp.maximum(p_BV - q_BV, 0)
    # Where p and q differ by rounding alone nothing may be left; p itself is then right to rounding.
    return jnp.where(jnp.any(left_BV > 0, axis=-1, keepdims=True), left_BV, p_BV)


def verify(
    p_BTV: Float[Array, "B T V"],
    q_BQW: Float[Array, "B Q W"],
    chain_BQ: Int[Array, "B Q"],
    target_ids_W: Int[Array, " W"],
    keys_B: Key[Array, " B"],
    num_B: Int[Array, " B"] | None = None,
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """How many tokens of each chain are accepted, and the token that follows them.

    Args:
        p_BTV: the target's distribution after each prefix of the chain, the empty one first.
        q_BQW: the draft's distributions, from which the chain was drawn.
        chain_BQ: draft ids.
        target_ids_W: the target id of each draft id; target tokens outside have q = 0.
        num_B: the tokens of each chain, where rows have fewer; what lies behind them was not drafted.
    """
    num_draft = chain_BQ.shape[1]
    keys_B2 = jax.vmap(lambda key: jax.random.split(key, 2))(keys_B)
    uniform_BQ = jax.vmap(lambda key: jax.random.uniform(key, (num_draft,), q_BQW.dtype))(keys_B2[:, 0])
    q_BQ = jnp.take_along_axis(q_BQW, chain_BQ[..., None], axis=-1)[..., 0]
    p_BQ = jnp.take_along_axis(p_BTV[:, :-1], target_ids_W[chain_BQ][..., None], axis=-1)[..., 0]
    accepted_BQ = uniform_BQ * q_BQ < p_BQ  # u < p / q; a drawn token has q > 0
    if num_B is not None:
        there_BQ = jnp.arange(num_draft)[None] < num_B[:, None]
        accepted_BQ, q_BQW = accepted_BQ & there_BQ, jnp.where(there_BQ[..., None], q_BQW, 0)
    accepted_B = jnp.sum(jnp.cumprod(accepted_BQ, axis=1, dtype=jnp.int32), axis=1, dtype=jnp.int32)
    rows_B = jnp.arange(len(chain_BQ))
    # After a whole chain nothing was drafted: q = 0 leaves p.
    refused_BW = jnp.pad(q_BQW, ((0, 0), (0, 1), (0, 0)))[rows_B, accepted_B]
    p_BV = p_BTV[rows_B, accepted_B]
    left_BV = residual(p_BV, jnp.zeros_like(p_BV).at[:, target_ids_W].set(refused_BW))
    next_B = jax.vmap(jax.random.categorical)(keys_B2[:, 1], jnp.log(left_BV))
    return accepted_B, next_B.astype(jnp.int32)
