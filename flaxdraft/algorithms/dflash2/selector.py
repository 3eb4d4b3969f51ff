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

from flaxdraft.devices.sharding import Sharding, gathered
from flaxdraft.nn.layers import latent
from flaxdraft.nn.precision import Precision
from flaxdraft.nn.vocabulary import lookup


class Selector(nnx.Module):
    """It adds nothing before training: the successors' codebook begins as 0."""

    def __init__(self, config: Any, precision: Precision, sharding: Sharding, rngs: nnx.Rngs):
        c, precision = config, dataclasses.replace(precision, float8=False)
        self.precision, self.sharding, shape = precision, sharding, (c.vocab_size, c.selector_rank)
        # Predecessors and successors; by these names optimizers know what reads tokens and what makes logits.
        tokens = nnx.initializers.normal(0.02)(rngs.params(), shape, precision.param)
        self.embed_tokens = nnx.Param(tokens, place="weight_ve")
        self.lm_head = nnx.Param(jnp.zeros(shape, precision.param), place="weight_ve")
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

    def successors_VE(self) -> Float[Array, "V E"]:
        """Whole along fsdp."""
        return gathered(self.lm_head[...], self.sharding.weight_ve)

    def scores(
        self, logit_BK: Float[Array, "B K"], id_BK: Int[Array, "B K"], latent_BE: Float[Array, "B E"]
    ) -> Float[Array, "B K"]:
        """Of the candidates of one slot a row, at least float32."""
        code_BKE = self.successors_VE().astype(latent_BE.dtype)[id_BK]
        return logit_BK + jnp.einsum("be,bke->bk", latent_BE, code_BKE, preferred_element_type=logit_BK.dtype)
