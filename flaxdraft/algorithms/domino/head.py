"""The head: a recurrent state of the tokens before a slot, and what it adds to that slot's logits.

    state = GRU over the embeddings of the newest token and the tokens behind it
    latent = silu(embed_proj.0 [draft's state ; state]);  logits = base logits + embed_proj.2 latent

Shape letters: B batch, R = A S rows of blocks of S slots, D draft width (the embedding's too), G width of the state, E
width of the latents, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from flaxdraft.devices.per_device import per_device
from flaxdraft.devices.sharding import Sharding, gathered, spec_of
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
        return _cell(self._kernel(), state_BG, self.input_proj(token_BD[:, None])[:, 0])

    def __call__(self, tokens_BRD: Float[Array, "B R D"], size: int) -> Float[Array, "B R G"]:
        """The state after each of a block's tokens; each block of `size` begins anew."""
        gates = self.input_proj(tokens_BRD)
        return per_device(partial(_along_blocks, size), spec_of(gates), gates, self._kernel())


def _cell(kernel, state, gates):
    """One step; gates [..., 3 G] are those of the token."""
    wide = state.dtype
    product = jnp.einsum("...g,gh->...h", state.astype(kernel.dtype), kernel, preferred_element_type=wide)
    (r, z, n), (of_r, of_z, of_n) = (jnp.split(x, 3, axis=-1) for x in (gates.astype(wide), product))
    r, z = jax.nn.sigmoid(r + of_r), jax.nn.sigmoid(z + of_z)
    return (1 - z) * jnp.tanh(n + r * of_n) + z * state


def _along_blocks(size: int, gates_BR3, kernel):
    gates = gates_BR3.reshape(gates_BR3.shape[0], -1, size, gates_BR3.shape[2])
    wide = jnp.promote_types(gates.dtype, jnp.float32)
    start = jnp.zeros((*gates.shape[:2], kernel.shape[0]), wide)

    def step(state, gates):
        state = _cell(kernel, state, gates)
        return state, state.astype(gates.dtype)

    _, states = lax.scan(step, start, jnp.moveaxis(gates, 2, 0))
    return jnp.moveaxis(states, 0, 2).reshape(*gates_BR3.shape[:2], -1)


class Correction(nnx.Module):
    """What the head adds. It adds nothing before training: its last matrix begins as 0."""

    def __init__(self, config: Any, precision: Precision, sharding: Sharding, rngs: nnx.Rngs):
        c, precision = config, dataclasses.replace(precision, float8=False)
        self.width, self.sharding = c.hidden_size, sharding
        self.prefix_gru = PrefixGRU(c.hidden_size, c.gru_hidden_dim, precision, sharding, rngs)
        self.projection = latent(c.hidden_size + c.gru_hidden_dim, c.emb_dim, precision, rngs, sharding)
        # By this name optimizers know what makes logits.
        self.lm_head = nnx.Param(jnp.zeros((c.vocab_size, c.emb_dim), precision.param), place="weight_ve")

    def latents(
        self, hidden_BRD: Float[Array, "B R D"], state_BRG: Float[Array, "B R G"]
    ) -> Float[Array, "B R E"]:  # fmt: skip
        """Of slots, with the state after the token before what each predicts."""
        of_hidden = self.projection(hidden_BRD, slice(self.width))
        return jax.nn.silu(of_hidden + self.projection(state_BRG, slice(self.width, None)))

    def head_VE(self) -> Float[Array, "V E"]:
        """Whole along fsdp."""
        return gathered(self.lm_head[...], self.sharding.weight_ve)

    def logits(self, latent_BRE: Float[Array, "B R E"]) -> Float[Array, "B R V"]:
        """What is added to logits, at least float32."""
        wide = jnp.promote_types(latent_BRE.dtype, jnp.float32)
        head_VE = self.head_VE().astype(latent_BRE.dtype)
        return jnp.einsum("bre,ve->brv", latent_BRE, head_VE, preferred_element_type=wide)
