"""The heads: what the token before a slot adds to that slot's logits, and how far to trust the slot.

    e = markov_w1[token before];  logits = base logits + markov_w2 latent
    vanilla: latent = e;  gated: latent = sigmoid(gate [draft's state; e]) * e
    rnn: g, c, o = joint [state; e; draft's state];  state = sigmoid(g) state + (1 - sigmoid(g)) tanh(c)
         latent = tanh(o), the state begins as 0 in every block
    confidence = proj [draft's state; e], before a sigmoid

Shape letters: B batch, R = A S rows of blocks of S slots, D draft width, E rank of the Markov head, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from flaxdraft.algorithms.dflash.logits_head import LogitsHead
from flaxdraft.algorithms.dflash.recurrence import along_blocks
from flaxdraft.devices.sharding import Sharding, gathered
from flaxdraft.nn.layers import latent
from flaxdraft.nn.precision import Precision
from flaxdraft.nn.vocabulary import lookup


class MarkovHead(LogitsHead):
    """What the token before a slot adds."""

    def __init__(self, config: Any, precision: Precision, sharding: Sharding, rngs: nnx.Rngs):
        c, precision = config, dataclasses.replace(precision, float8=False)
        super().__init__(c.vocab_size, c.markov_rank, precision, sharding)
        self.kind, self.rank, self.precision = c.markov_head_type, c.markov_rank, precision
        # By this name optimizers know what reads tokens.
        self.embed_tokens = nnx.Param(
            nnx.initializers.normal(0.02)(rngs.params(), (c.vocab_size, c.markov_rank), precision.param),
            place="weight_ve",
        )
        projection = partial(latent, precision=precision, rngs=rngs, s=sharding, use_bias=True)
        if self.kind == "gated":
            self.gate_proj = projection(c.hidden_size + c.markov_rank, c.markov_rank)
        if self.kind == "rnn":
            self.joint_proj = projection(2 * c.markov_rank + c.hidden_size, 3 * c.markov_rank)

    def embed(self, token_BR: Int[Array, "B R"]) -> Float[Array, "B R E"]:
        """Of the token before each slot."""
        return lookup(self.embed_tokens[...], token_BR, self.sharding).astype(self.precision.compute)

    def start(self, num_rows: int) -> Float[Array, "B E"]:
        """The state before a block."""
        return jnp.zeros((num_rows, self.rank), jnp.promote_types(self.precision.compute, jnp.float32))

    def _read(self, before_BRE: Float[Array, "B R E"], hidden_BRD: Float[Array, "B R D"]):
        """What the recurrent head makes of a slot but for its state, and how that joins."""
        joint = self.joint_proj
        kernel = gathered(joint.kernel[...], joint.spec)[: self.rank].astype(self.precision.compute)
        return joint(jnp.concatenate([before_BRE, hidden_BRD], axis=-1), slice(self.rank, None)), kernel

    def latents(
        self, before_BRE: Float[Array, "B R E"], hidden_BRD: Float[Array, "B R D"], size: int
    ) -> Float[Array, "B R E"]:  # fmt: skip
        """Of every slot of blocks of `size`."""
        if self.kind == "rnn":
            gates, kernel = self._read(before_BRE, hidden_BRD)
            return along_blocks(_cell, size, gates, kernel)
        if self.kind == "gated":
            gate = self.gate_proj(jnp.concatenate([hidden_BRD, before_BRE], axis=-1))
            return jax.nn.sigmoid(gate) * before_BRE
        return before_BRE

    def step(
        self, state_BE: Float[Array, "B E"], before_B1E: Float[Array, "B 1 E"], hidden_B1D: Float[Array, "B 1 D"]
    ) -> tuple[Float[Array, "B E"], Float[Array, "B 1 E"]]:
        """The same of one slot, with the state after it."""
        if self.kind != "rnn":
            return state_BE, self.latents(before_B1E, hidden_B1D, 1)
        gates, kernel = self._read(before_B1E, hidden_B1D)
        state_BE, latent_BE = _cell(kernel, state_BE, gates[:, 0])
        return state_BE, latent_BE[:, None].astype(before_B1E.dtype)


def _cell(kernel, state, gates):
    """One slot; gates [..., 3 E] are those of the token and the draft's state."""
    product = jnp.einsum("...e,ef->...f", state.astype(kernel.dtype), kernel, preferred_element_type=state.dtype)
    keep, new, out = jnp.split(gates.astype(state.dtype) + product, 3, axis=-1)
    keep = jax.nn.sigmoid(keep)
    return keep * state + (1 - keep) * jnp.tanh(new), jnp.tanh(out)


class ConfidenceHead(nnx.Module):
    """The logit of the probability that the target accepts what a slot proposes, if it accepted what came before."""

    def __init__(self, config: Any, precision: Precision, sharding: Sharding, rngs: nnx.Rngs):
        self.with_markov = config.confidence_head_with_markov
        width = config.hidden_size + (config.markov_rank if self.with_markov else 0)
        precision = dataclasses.replace(precision, float8=False)
        self.proj = latent(width, 1, precision, rngs, sharding, use_bias=True)

    def __call__(
        self, hidden_BRD: Float[Array, "B R D"], before_BRE: Float[Array, "B R E"]
    ) -> Float[Array, "B R"]:  # fmt: skip
        """At least float32."""
        read = jnp.concatenate([hidden_BRD, before_BRE], axis=-1) if self.with_markov else hidden_BRD
        logit_BR = self.proj(read)[:, :, 0]
        return logit_BR.astype(jnp.promote_types(logit_BR.dtype, jnp.float32))
