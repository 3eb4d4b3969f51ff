"""The draft: layers over blocks, which read the target's tapped states as further keys and values (arXiv 2602.06036).

    context = hidden_norm(fc(taps)), once; each layer makes keys and values of it by its own k_proj and v_proj
    x = x + attn(input_layernorm(x), context); x = x + mlp(post_attention_layernorm(x)); logits = head(norm(x))

The context does not pass input_layernorm. Embedding and head are the target's, frozen; a draft of a reduced vocabulary,
which another trainer made, brings the head's rows of its tokens. Four switches that engines read give every head a sink
in its softmax, scale all values, scale the logits and cap them.

Shape letters: B batch, T rows of the text, A blocks, R = A S rows of blocks of S slots, K tapped layers or key/value
heads, H head width, D width (the target's as well), E target width, V tokens that the draft knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from flaxdraft.algorithms.dflash.block_attention import Keys, Sight, Way, block_attention
from flaxdraft.devices.sharding import Sharding, along, gathered, spec_of
from flaxdraft.errors import InputError
from flaxdraft.interfaces import EmbeddingAndHead, VocabMap
from flaxdraft.nn.layers import Frozen, GatedMLP, Kept, RMSNorm, column
from flaxdraft.nn.precision import Precision
from flaxdraft.nn.self_attention import Heads
from flaxdraft.nn.vocabulary import lookup
from flaxdraft.ops.cross_entropy import Logits
from flaxdraft.ops.remat import POLICIES, Remat


class Places(NamedTuple):
    """Where blocks stand."""

    anchor_BA: Int[Array, "B A"]  # the row of the text where each begins, which it does not see there
    first_BA: Int[Array, "B A"]  # the row where its document begins
    position_BA: Int[Array, "B A"]  # of its first slot


class Layer(nnx.Module):
    """One layer: blocks attend to the text and to themselves, then comes a feed-forward."""

    def __init__(
        self, config: Any, attention: Heads, sight: Sight, precision: Precision, sharding: Sharding, rngs: nnx.Rngs
    ):
        c = config
        self.sight, self.value_scale = sight, c.attention_value_scale
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, precision)
        self.self_attn = attention
        if c.attention_sink_bias:
            self.sink = nnx.Param(jnp.zeros(c.num_attention_heads, precision.param), place="weight_f")
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, precision)
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, precision, rngs, sharding)

    def read(self, context_BTD: Float[Array, "B T D"], positions_BT: Int[Array, "B T"]) -> Keys:
        """Keys and values of the text."""
        return Keys(*self.self_attn.key_value(self.self_attn.project(context_BTD), positions_BT))

    def attend(
        self, normed_BRD: Float[Array, "B R D"], text: Keys, places: Places, way: Way
    ) -> Float[Array, "B R D"]:  # fmt: skip
        """What attention adds to the slots."""
        position_BRs = places.position_BA[:, :, None] + jnp.arange(self.sight.size)[None, None]
        positions_BR = position_BRs.reshape(normed_BRD.shape[:2])
        attention = self.self_attn
        projected = attention.project(normed_BRD)
        q, own = attention.query(projected, positions_BR), Keys(*attention.key_value(projected, positions_BR))
        seen = self.sight.text(places.anchor_BA, places.first_BA)
        sink = self.sink[...] if hasattr(self, "sink") else None
        heads = block_attention(q, text, own, seen, self.sight, attention.softmax_scale, way, sink)
        if self.value_scale != 1:  # of all values, hence of what they add up to
            heads = heads * self.value_scale
        return attention.output(heads)

    def __call__(
        self, hidden_BRD: Float[Array, "B R D"], text: Keys, places: Places, way: Way
    ) -> Float[Array, "B R D"]:  # fmt: skip
        hidden_BRD = hidden_BRD + self.attend(self.input_layernorm(hidden_BRD), text, places, way)
        return hidden_BRD + self.mlp(self.post_attention_layernorm(hidden_BRD))


class BlockDraft(nnx.Module):
    """See `interfaces.Draft`; an architecture gives the config and each layer's attention."""

    layer: type[Layer] = Layer  # an algorithm that builds on this one may have its own

    def __init__(
        self, config: Any, attentions: Sequence[Heads], vocab: VocabMap, target: EmbeddingAndHead, *,
        precision: Precision, sharding: Sharding, rngs: nnx.Rngs,
    ):  # fmt: skip
        """
        Raises:
            InputError: the vocabulary map is not the config's.
        """
        c = config
        vocab.check_fits(c)
        self.config, self.precision, self.sharding = config, precision, sharding
        # In the precision in which every step reads them.
        self.embed_tokens = Frozen(target.embedding().astype(precision.compute), place="weight_ve")
        self.target_ids = Frozen(jnp.asarray(vocab.target_ids_W, jnp.int32), place="whole")
        if c.knows_every_token:
            self.head = Frozen(target.head().astype(precision.compute), place="weight_ve")
        else:
            self.draft_ids = Frozen(jnp.asarray(vocab.to_draft()), place="whole")
            self.lm_head = Kept(target.head()[vocab.target_ids_W].astype(precision.param), place="weight_ve")
        self.fc = column(c.num_taps * c.target_hidden_size, c.hidden_size, precision, rngs, sharding)
        self.hidden_norm = RMSNorm(c.hidden_size, c.rms_norm_eps, precision)
        for i, (attention, sight) in enumerate(zip(attentions, c.sights(), strict=True)):
            setattr(self, f"layer_{i}", self.layer(c, attention, sight, precision, sharding, rngs))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, precision)

    @property
    def layers(self) -> list[Layer]:
        return [getattr(self, f"layer_{i}") for i in range(self.config.num_hidden_layers)]

    def context(self, taps_BTKE: Float[Array, "B T K E"]) -> Float[Array, "B T D"]:
        """What layers read of the text, the same for all of them.

        Raises:
            InputError: the features are not those of the draft's target.
        """
        found, wanted = taps_BTKE.shape[2:], (self.config.num_taps, self.config.target_hidden_size)
        if found != wanted:
            raise InputError(
                f"features: tapped states of shape {found} a token, expected {wanted} from the draft's config; the "
                "features and the draft are of different targets"
            )
        joined = taps_BTKE.astype(self.precision.compute).reshape(*taps_BTKE.shape[:2], -1)
        # Nobody sums over the taps' width, which every device holds: fc is split by its outputs, put together here.
        projected, spec = self.fc(joined), along(joined, self.sharding.act_btd)
        return self.hidden_norm(projected if spec is None else jax.reshard(projected, spec))

    def read(self, taps_BTKE: Float[Array, "B T K E"], positions_BT: Int[Array, "B T"]) -> list[Keys]:
        """Each layer's keys and values of the text, made once for all blocks."""
        context_BTD = self.context(taps_BTKE)
        return [layer.read(context_BTD, positions_BT) for layer in self.layers]

    def __call__(
        self, token_BA: Int[Array, "B A"], text: list[Keys], places: Places, way: Way, remat: Remat = "none"
    ) -> Float[Array, "B R D"]:
        """The head's input at every slot of the blocks.

        Args:
            token_BA: the newest token of each block.
        """
        slot_S = jnp.arange(self.config.block_size)[None, None]
        tokens_BAS = jnp.where(slot_S == 0, token_BA[:, :, None], self.config.mask_token_id)
        tokens_BR = tokens_BAS.reshape(token_BA.shape[0], -1)
        hidden_BRD = lookup(self.embed_tokens[...], tokens_BR, self.sharding)
        for layer, keys in zip(self.layers, text, strict=True):
            run = partial(layer, places=places, way=way)
            hidden_BRD = (run if remat == "none" else jax.checkpoint(run, policy=POLICIES[remat]))(hidden_BRD, keys)
        return self.norm(hidden_BRD)

    @property
    def made_of(self) -> Logits:
        """What is made of the head's products to get logits."""
        return Logits(self.config.output_multiplier, self.config.final_logit_softcapping)

    def head_VD(self) -> Float[Array, "V D"]:
        """The target's head, or its rows of the tokens that the draft knows, whole along fsdp."""
        head = self.head if self.config.knows_every_token else self.lm_head
        return gathered(head[...], self.sharding.weight_ve).astype(self.precision.compute)

    def known(self, token_BAS: Int[Array, "B A S"]) -> Int[Array, "B A S"]:
        """The draft ids of target tokens; -1 for what the draft does not know."""
        if self.config.knows_every_token:
            return token_BAS
        spec = None if self.sharding.act_b is None else spec_of(token_BAS)
        return self.draft_ids[...].at[token_BAS].get(out_sharding=spec)

    def logits(self, hidden_BRD: Float[Array, "B R D"]) -> Float[Array, "B R V"]:
        """The logits of every slot, at least float32."""
        wide = jnp.promote_types(self.precision.compute, jnp.float32)
        product_BRV = jnp.einsum("brd,vd->brv", hidden_BRD, self.head_VD(), preferred_element_type=wide)
        return self.made_of.of(product_BRV)
