"""The draft: layers over blocks, which read the target's tapped states as keys and values.

Shape letters: B batch, T time (of blocks: all their positions, one block after the other), S positions of the text,
K tapped layers, D width (the target's as well), V vocabulary, X = S + T.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from flaxdraft.devices.per_device import per_device
from flaxdraft.devices.sharding import Sharding, spec_of
from flaxdraft.errors import InputError
from flaxdraft.interfaces import EmbeddingAndHead, VocabMap
from flaxdraft.nn.gqa import GQA, GQAConfig
from flaxdraft.nn.layers import Frozen, GatedMLP, RMSNorm, latent
from flaxdraft.nn.precision import Precision
from flaxdraft.nn.vocabulary import lookup
from flaxdraft.ops.attention import attend


class Text(NamedTuple):
    """What was read: projected taps, and where they stand in their documents."""

    context_BSD: Float[Array, "B S D"]
    positions_BS: Int[Array, "B S"]


class Layer(nnx.Module):
    """Attention of blocks to the text and to themselves, and a feed-forward."""

    def __init__(self, config, precision: Precision, rngs: nnx.Rngs, sharding: Sharding):
        c = config
        heads = GQAConfig(c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rope)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, precision)
        self.self_attn = GQA(heads, c.hidden_size, c.hidden_size, precision, rngs, sharding)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, precision)
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, precision, rngs, sharding)

    def __call__(self, hidden_BTD, positions_BT, text: Text, visible_BTX):
        attention = self.self_attn
        own, read = attention.project(self.input_layernorm(hidden_BTD)), attention.project(text.context_BSD)
        pairs = zip(attention.key_value(read, text.positions_BS), attention.key_value(own, positions_BT), strict=True)
        q, (k, v) = attention.query(own, positions_BT), (jnp.concatenate(pair, axis=1) for pair in pairs)
        heads = per_device(partial(attend, scale=attention.softmax_scale), spec_of(q), q, k, v, visible_BTX)
        hidden_BTD = hidden_BTD + attention.output(heads)
        return hidden_BTD + self.mlp(self.post_attention_layernorm(hidden_BTD))


class BlockDraft(nnx.Module):
    """See `interfaces.Draft`."""

    def __init__(
        self, config, vocab: VocabMap, target: EmbeddingAndHead, *, precision: Precision, sharding: Sharding,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        """
        Raises:
            InputError: the vocabulary map is not the target's whole vocabulary.
        """
        c = config
        if (vocab.draft_vocab_size, vocab.vocab_size) != (c.draft_vocab_size, c.vocab_size):
            raise InputError(
                f"vocabulary map: {vocab.draft_vocab_size} of {vocab.vocab_size} tokens, the draft config says "
                f"{c.draft_vocab_size} of {c.vocab_size}"
            )
        self.config, self.precision, self.sharding = config, precision, sharding
        self.embed_tokens = Frozen(target.embedding(), place="weight_ve")
        self.head = Frozen(target.head(), place="weight_ve")
        self.target_ids = Frozen(jnp.arange(c.vocab_size, dtype=jnp.int32), place="whole")
        self.fc = latent(c.num_taps * c.hidden_size, c.hidden_size, precision, rngs, sharding)
        self.context_norm = RMSNorm(c.hidden_size, c.rms_norm_eps, precision)
        for i in range(c.num_hidden_layers):
            setattr(self, f"layer_{i}", Layer(c, precision, rngs, sharding))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, precision)

    def context(self, taps_BTKE: Float[Array, "B T K D"]) -> Float[Array, "B T D"]:
        """What layers read of the text, the same for all of them."""
        joined = taps_BTKE.astype(self.precision.compute).reshape(*taps_BTKE.shape[:2], -1)
        return self.context_norm(self.fc(joined))

    def logits(
        self,
        newest_BA: Int[Array, "B A"],
        positions_BA: Int[Array, "B A"],
        text: Text,
        visible_BAS: Bool[Array, "B A S"],
    ) -> Float[Array, "B A Q V"]:
        """Of all proposals of blocks behind some newest tokens.

        Args:
            visible_BAS: the text that each block reads.
        """
        size, (num_batch, num) = self.config.block_size, newest_BA.shape
        place_b = jnp.arange(size)[None, None]
        tokens = jnp.where(place_b == 0, newest_BA[..., None], self.config.mask_token_id)
        flat = lambda x: x.reshape(num_batch, num * size, *x.shape[3:])  # noqa: E731
        positions_BT, block_T = flat(positions_BA[..., None] + place_b), jnp.arange(num * size) // size
        same_BTT = jnp.broadcast_to(
            block_T[None, :, None] == block_T[None, None], (num_batch, len(block_T), len(block_T))
        )
        read_BTS = flat(jnp.broadcast_to(visible_BAS[:, :, None], (num_batch, num, size, visible_BAS.shape[2])))
        same_BTT = same_BTT & (positions_BT[:, :, None] >= 0)  # split over devices as the rest is
        visible_BTX = jnp.concatenate([read_BTS, same_BTT], axis=2)
        hidden = lookup(self.embed_tokens[...], flat(tokens), self.sharding).astype(self.precision.compute)
        for i in range(self.config.num_hidden_layers):
            hidden = getattr(self, f"layer_{i}")(hidden, positions_BT, text, visible_BTX)
        hidden = hidden.reshape(num_batch, num, size, -1)[:, :, 1:]
        head_VD = self.head[...] if self.sharding.whole is None else jax.reshard(self.head[...], self.sharding.whole)
        wide = jnp.promote_types(self.precision.compute, jnp.float32)
        head_VD = head_VD.astype(self.precision.compute)
        return jnp.einsum("baqd,vd->baqv", self.norm(hidden), head_VD, preferred_element_type=wide)
