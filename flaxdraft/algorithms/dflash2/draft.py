"""The draft: DFlash's, with convolutions in its layers and the selector beside it. Shape letters: B batch, R = A S rows
of blocks of S slots, D width."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from flaxdraft.algorithms.dflash.block_attention import Keys, Sight, Way
from flaxdraft.algorithms.dflash.draft import BlockDraft, Layer, Places
from flaxdraft.algorithms.dflash2.convolution import Convolution
from flaxdraft.algorithms.dflash2.selector import Selector
from flaxdraft.devices.sharding import Sharding
from flaxdraft.interfaces import EmbeddingAndHead, VocabMap
from flaxdraft.nn.precision import Precision
from flaxdraft.nn.self_attention import Heads


class ConvolvedLayer(Layer):
    """Slots pass a convolution before and behind attention and feed-forward; keys and values of the text pass none."""

    def __init__(
        self, config: Any, attention: Heads, sight: Sight, precision: Precision, sharding: Sharding, rngs: nnx.Rngs
    ):
        super().__init__(config, attention, sight, precision, sharding, rngs)
        self.attention_conv = Convolution(config, precision, sharding, rngs)
        self.mlp_conv = Convolution(config, precision, sharding, rngs)

    def __call__(
        self, hidden_BRD: Float[Array, "B R D"], text: Keys, places: Places, way: Way
    ) -> Float[Array, "B R D"]:  # fmt: skip
        attend = partial(self.attend, text=text, places=places, way=way)
        hidden_BRD = hidden_BRD + self.attention_conv(self.input_layernorm(hidden_BRD), attend)
        return hidden_BRD + self.mlp_conv(self.post_attention_layernorm(hidden_BRD), self.mlp)


class DFlash2Draft(BlockDraft):
    """See `BlockDraft`."""

    layer = ConvolvedLayer

    def __init__(
        self, config: Any, attentions: Sequence[Heads], vocab: VocabMap, target: EmbeddingAndHead, *,
        precision: Precision, sharding: Sharding, rngs: nnx.Rngs,
    ):  # fmt: skip
        super().__init__(config, attentions, vocab, target, precision=precision, sharding=sharding, rngs=rngs)
        self.selector = Selector(config, precision, sharding, rngs)
