"""The selector: how well each of a slot's candidates goes with the token before it.

    score = logit + sum over e of predecessor[token before]_e (projection h)_e successor[candidate]_e

Shape letters: B batch, R = A S rows of blocks of S slots, D draft width, E width of the codebooks, K candidates, V
vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from flaxdraft.algorithms.dflash.logits_head import LogitsHead
from flaxdraft.devices.sharding import Sharding
from flaxdraft.nn.layers import latent
from flaxdraft.nn.precision import Precision
from flaxdraft.nn.vocabulary import lookup


class Selector(LogitsHead):
    """The successors' codebook is its head."""

    def __init__(self, config: Any, precision: Precision, sharding: Sharding, rngs: nnx.Rngs):
        c, precision = config, dataclasses.replace(precision, float8=False)
        super().__init__(c.vocab_size, c.selector_rank, precision, sharding)
        self.precision = precision
        tokens = nnx.initializers.normal(0.02)(rngs.params(), (c.vocab_size, c.selector_rank), precision.param)
        # The predecessors' codebook; by this name optimizers know what reads tokens.
        self.embed_tokens = nnx.Param(tokens, place="weight_ve")
        self.projection = latent(c.hidden_size, c.selector_rank, precision, rngs, sharding)

    def latents(
        self, hidden_BRD: Float[Array, "B R D"], before_BR: Int[Array, "B R"]
    ) -> Float[Array, "B R E"]:  # fmt: skip
        """What the codebook row of a candidate is multiplied by.

        Args:
            before_BR: the token before each slot.
        """
        before_BRE = lookup(self.embed_tokens[...], before_BR, self.sharding).astype(self.precision.compute)
        return before_BRE * self.projection(hidden_BRD)

    def scores(
        self, logit_BK: Float[Array, "B K"], id_BK: Int[Array, "B K"], latent_BE: Float[Array, "B E"]
    ) -> Float[Array, "B K"]:
        """Of the candidates of one slot a row, at least float32."""
        code_BKE = self.head_VE()[id_BK].astype(latent_BE.dtype)
        return logit_BK + jnp.einsum("be,bke->bk", latent_BE, code_BKE, preferred_element_type=logit_BK.dtype)
