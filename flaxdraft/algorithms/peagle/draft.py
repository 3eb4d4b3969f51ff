"""The draft: EAGLE-3's layer with further ones behind it, and a state of its own for places that are masked.

    place of a real token: x = concat(input_layernorm(embed), hidden_norm(fc(taps))), as in EAGLE-3
    masked place: the same of the mask token and of `mask_hidden`, which stands in for the taps
    h = layer(...layer(first layer(x))), the further layers like those of a language model; logits = lm_head(norm(h))

Embedding and mask state are trained.

Shape letters: B batch, T rows of the text, R elements of a depth, K tapped layers, D draft width, E target width,
W draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flaxdraft.algorithms.eagle3.draft import Eagle3Draft
from flaxdraft.devices.per_device import per_device
from flaxdraft.devices.sharding import Sharding, spec_of
from flaxdraft.interfaces import EmbeddingAndHead, VocabMap
from flaxdraft.nn.layers import GatedMLP, RMSNorm
from flaxdraft.nn.precision import Precision
from flaxdraft.nn.self_attention import Heads


class Layer(nnx.Module):
    """One of the layers behind the first. Attention itself is brought by whoever knows what is seen."""

    def __init__(self, config: Any, attention: Heads, precision: Precision, sharding: Sharding, rngs: nnx.Rngs):
        c = config
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, precision)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, precision)
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, precision, rngs, sharding)

    def project(self, hidden_BRD: Float[Array, "B R D"]) -> Any:
        """What the attention's projections make of a hidden state."""
        return self.self_attn.project(self.input_layernorm(hidden_BRD))

    def finish(self, hidden_BRD: Float[Array, "B R D"], heads_BRNC: Float[Array, "B R N C"]) -> Float[Array, "B R D"]:
        """Output projection, residual and feed-forward."""
        hidden_BRD = hidden_BRD + self.self_attn.output(heads_BRNC)
        return hidden_BRD + self.mlp(self.post_attention_layernorm(hidden_BRD))


class ParallelDraft(Eagle3Draft):
    """See `interfaces.Draft`; an architecture gives the config and each layer's attention."""

    def __init__(
        self, config: Any, attentions: Sequence[Heads], vocab: VocabMap, target: EmbeddingAndHead, *,
        precision: Precision, sharding: Sharding, rngs: nnx.Rngs,
    ):  # fmt: skip
        """
        Args:
            attentions: of each layer.
            target: its embedding is the one to begin with, where the widths agree.

        Raises:
            InputError: the vocabulary map does not fit the config.
        """
        c = config
        super().__init__(c, attentions[0], vocab, None, precision=precision, sharding=sharding, rngs=rngs)
        if c.hidden_size == c.target_hidden_size:
            self.embed_tokens = nnx.Param(target.embedding().astype(precision.param), place="weight_ve")
        state = nnx.initializers.normal(1.0)(rngs.params(), (1, 1, 3 * c.target_hidden_size), precision.param)
        self.mask_hidden = nnx.Param(state, place="whole")
        for i, attention in enumerate(attentions[1:], 1):
            setattr(self, f"layer_{i}", Layer(c, attention, precision, sharding, rngs))

    @property
    def further(self) -> list[Layer]:
        """The layers behind the first."""
        return [getattr(self, f"layer_{i}") for i in range(1, self.config.num_hidden_layers)]

    def masked(self, taps_BTKE: Float[Array, "B T K E"]) -> tuple[Float[Array, "B 1 D"], Any]:
        """A masked place before it knows its position: the state that its residual begins with, and what the first
        layer's projections make of it. All masked places have the same.

        Args:
            taps_BTKE: any; only their shape and how they lie on the mesh are read.
        """
        like_B1KE = jax.lax.stop_gradient(taps_BTKE[:, :1])
        tokens_B1 = jnp.full_like(like_B1KE[:, :, 0, 0], self.config.mask_token_id, jnp.int32)

        def spread(like_B1KE, state):
            return jnp.broadcast_to(state.astype(like_B1KE.dtype).reshape(1, 1, *like_B1KE.shape[2:]), like_B1KE.shape)

        state_B1KE = per_device(spread, spec_of(like_B1KE), like_B1KE, self.mask_hidden[...])
        hidden_B1D = self.project(state_B1KE)
        return hidden_B1D, self.projections(self.token_projections(self.embed(tokens_B1)), hidden_B1D)
