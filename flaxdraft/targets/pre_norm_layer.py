"""The layer of the Llama and DeepSeek families: a norm before attention and one before the feed-forward.

Shape letters: B batch, T time, E width.
"""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float, Int

from flaxdraft.nn.layers import RMSNorm
from flaxdraft.nn.precision import Precision
from flaxdraft.nn.self_attention import Attend, Heads, self_attention
from flaxdraft.targets.decoder import DecoderConfig


class PreNormLayer(nnx.Module):
    """x = x + attention(norm(x)); x + feed_forward(norm(x)). See `decoder.Layer`."""

    def __init__(self, config: DecoderConfig, attention: Heads, mlp: nnx.Module, precision: Precision):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, precision)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, precision)
        self.mlp = mlp

    def __call__(
        self, x_BTE: Float[Array, "B T E"], positions_BT: Int[Array, "B T"], attend: Attend, number: Int[Array, ""]
    ) -> Float[Array, "B T E"]:
        x_BTE = x_BTE + self_attention(self.self_attn, self.input_layernorm(x_BTE), positions_BT, attend)
        return x_BTE + self.mlp(self.post_attention_layernorm(x_BTE))
