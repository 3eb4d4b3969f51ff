"""A narrow trained matrix over the vocabulary, beside the target's head: algorithms that build on DFlash correct logits
with it, or choose by it.

Shape letters: B batch, R rows, E width of the latents, V vocabulary.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flaxdraft.devices.sharding import Sharding, gathered
from flaxdraft.nn.precision import Precision


class LogitsHead(nnx.Module):
    """It adds nothing before training: the matrix begins as 0."""

    def __init__(self, vocab_size: int, width: int, precision: Precision, sharding: Sharding):
        self.sharding = sharding
        # By this name optimizers know what makes logits.
        self.lm_head = nnx.Param(jnp.zeros((vocab_size, width), precision.param), place="weight_ve")

    def head_VE(self) -> Float[Array, "V E"]:
        """Whole along fsdp."""
        return gathered(self.lm_head[...], self.sharding.weight_ve)

    def logits(self, latent_BRE: Float[Array, "B R E"]) -> Float[Array, "B R V"]:
        """What is added to logits, at least float32."""
        wide = jnp.promote_types(latent_BRE.dtype, jnp.float32)
        head_VE = self.head_VE().astype(latent_BRE.dtype)
        return jnp.einsum("bre,ve->brv", latent_BRE, head_VE, preferred_element_type=wide)
