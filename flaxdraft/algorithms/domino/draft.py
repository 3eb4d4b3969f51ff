"""The draft: DFlash's, with the head beside it. Shape letters: B batch, R = A S rows of blocks of S slots, D width, E
width of the latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from flaxdraft.algorithms.dflash.draft import BlockDraft
from flaxdraft.algorithms.dflash.layout import Layout, layout_of
from flaxdraft.algorithms.domino.head import Correction
from flaxdraft.devices.sharding import Sharding
from flaxdraft.interfaces import EmbeddingAndHead, VocabMap
from flaxdraft.nn.precision import Precision
from flaxdraft.nn.self_attention import Heads
from flaxdraft.nn.vocabulary import lookup


class DominoDraft(BlockDraft):
    """See `BlockDraft`."""

    def __init__(
        self, config: Any, attentions: Sequence[Heads], vocab: VocabMap, target: EmbeddingAndHead, *,
        precision: Precision, sharding: Sharding, rngs: nnx.Rngs,
    ):  # fmt: skip
        super().__init__(config, attentions, vocab, target, precision=precision, sharding=sharding, rngs=rngs)
        self.correction = Correction(config, precision, sharding, rngs)

    @property
    def layout(self) -> Layout:
        return layout_of(self.config.block_size, self.config.shift_label)

    def embed(self, tokens_BR: Int[Array, "B R"]) -> Float[Array, "B R D"]:
        return lookup(self.embed_tokens[...], tokens_BR, self.sharding)

    def latents(
        self, hidden_BRD: Float[Array, "B R D"], tokens_BR: Int[Array, "B R"]
    ) -> Float[Array, "B R E"]:  # fmt: skip
        """Of every slot of some blocks; 0 where nothing is corrected.

        Args:
            hidden_BRD: the head's input.
            tokens_BR: the text from each block's newest token on.
        """
        size, first = self.config.block_size, self.layout.first
        state_BRG = self.correction.prefix_gru(self.embed(tokens_BR), size)
        if first:  # slot k predicts the text's token k, and must not have read it
            state_BRG = jnp.pad(state_BRG, ((0, 0), (first, 0), (0, 0)))[:, : state_BRG.shape[1]]
        corrected_S = jnp.arange(size) >= first + self.config.pure_draft_prefix_len
        latents_BRE = self.correction.latents(hidden_BRD, state_BRG)
        corrected_R = jnp.tile(corrected_S, latents_BRE.shape[1] // size)
        return jnp.where(corrected_R[None, :, None], latents_BRE, 0)
