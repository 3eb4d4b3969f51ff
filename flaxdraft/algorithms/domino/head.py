"""The head: a recurrent state of the tokens before a slot, and what it adds to that slot's logits.

    state = GRU over the embeddings of the newest token and the tokens behind it
    latent = silu(embed_proj.0 [draft's state ; state]);  logits = base logits + embed_proj.2 latent

Shape letters: B batch, R = A S rows of blocks of S slots, D draft width (the embedding's too), G width of the state, E
width of the latents, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flaxdraft.algorithms.dflash.logits_head import LogitsHead
from flaxdraft.algorithms.dflash.recurrence import along_blocks
from flaxdraft.devices.sharding import Sharding, gathered
from flaxdraft.nn.layers import latent
from flaxdraft.nn.precision import Precision


class PrefixGRU(nnx.Module):
    """torch.nn.GRU of one layer without biases, gates in the order r, z, n; the state is at least float32."""

    def __init__(self, num_in: int, width: int, precision: Precision, sharding: Sharding, rngs: nnx.Rngs):
        self.width = width
        self.input_proj = latent(num_in, 3 * width, precision, rngs, sharding)
        self.state_proj = latent(width, 3 * width, precision, rngs, sharding)

    def start(self, num_rows: int) -> Float[Array, "B G"]:
        """Before the first token."""
        return jnp.zeros((num_rows, self.width), jnp.promote_types(self.input_proj.precision.compute, jnp.float32))

    def _kernel(self) -> Float[Array, "G 3G"]:
        of = self.state_proj
        return gathered(of.kernel[...], of.spec).astype(of.precision.compute)

    def step(self, state_BG: Float[Array, "B G"], token_BD: Float[Array, "B D"]) -> Float[Array, "B G"]:
        """The state after one more token."""
        return _cell(self._kernel(), state_BG, self.input_proj(token_BD[:, None])[:, 0])[0]

    def __call__(self, tokens_BRD: Float[Array, "B R D"], size: int) -> Float[Array, "B R G"]:
        """The state after each of a block's tokens; each block of `size` begins anew."""
        gates = self.input_proj(tokens_BRD)
        return along_blocks(_cell, size, gates, self._kernel())


def _cell(kernel, state, gates):
    """One step, which gives its state; gates [..., 3 G] are those of the token."""
    wide = state.dtype
    product = jnp.einsum("...g,gh->...h", state.astype(kernel.dtype), kernel, preferred_element_type=wide)
    (r, z, n), (of_r, of_z, of_n) = (jnp.split(x, 3, axis=-1) for x in (gates.astype(wide), product))
    r, z = jax.nn.sigmoid(r + of_r), jax.nn.sigmoid(z + of_z)
    state = (1 - z) * jnp.tanh(n + r * of_n) + z * state
    return state, state


class Correction(LogitsHead):
    """What the head adds."""

    def __init__(self, config: Any, precision: Precision, sharding: Sharding, rngs: nnx.Rngs):
        c, precision = config, dataclasses.replace(precision, float8=False)
        super().__init__(c.vocab_size, c.emb_dim, precision, sharding)
        self.width = c.hidden_size
        self.prefix_gru = PrefixGRU(c.hidden_size, c.gru_hidden_dim, precision, sharding, rngs)
        self.projection = latent(c.hidden_size + c.gru_hidden_dim, c.emb_dim, precision, rngs, sharding)

    def latents(
        self, hidden_BRD: Float[Array, "B R D"], state_BRG: Float[Array, "B R G"]
    ) -> Float[Array, "B R E"]:  # fmt: skip
        """Of slots, with the state after the token before what each predicts."""
        of_hidden = self.projection(hidden_BRD, slice(self.width))
        return jax.nn.silu(of_hidden + self.projection(state_BRG, slice(self.width, None)))
