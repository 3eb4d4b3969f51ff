"""Grouped-query attention's projections (Llama family).

Shape letters: B batch, T time, X input width, N query heads, K key/value heads, H head width, D output width.
"""

from __future__ import annotations

import dataclasses

from flax import nnx
from jaxtyping import Array, Float, Int

from flaxdraft.nn.layers import linear
from flaxdraft.nn.rope import RopeConfig, cos_sin, rotate_half
from flaxdraft.precision import Precision


@dataclasses.dataclass(frozen=True)
class GQAConfig:
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: RopeConfig


class GQA(nnx.Module):
    """q, k, v and output projections with rotary positions; the softmax itself is an operation of ops/."""

    def __init__(self, config: GQAConfig, num_in: int, num_out: int, precision: Precision, rngs: nnx.Rngs):
        self.config = config
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = linear(num_in, width, precision, rngs)
        self.k_proj = linear(num_in, kv_width, precision, rngs)
        self.v_proj = linear(num_in, kv_width, precision, rngs)
        self.o_proj = linear(width, num_out, precision, rngs)

    @property
    def softmax_scale(self) -> float:
        return self.config.head_dim**-0.5

    def _heads(self, x, num: int):
        return x.reshape(*x.shape[:-1], num, self.config.head_dim)

    def query(self, x_BTX: Float[Array, "B T X"], positions_BT: Int[Array, "B T"]) -> Float[Array, "B T N H"]:
        q_BTNH = self._heads(self.q_proj(x_BTX), self.config.num_attention_heads)
        return rotate_half(q_BTNH, *cos_sin(self.config.rope, self.config.head_dim, positions_BT))

    def key_value(
        self, x_BTX: Float[Array, "B T X"], positions_BT: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        k_BTKH = self._heads(self.k_proj(x_BTX), self.config.num_key_value_heads)
        v_BTKH = self._heads(self.v_proj(x_BTX), self.config.num_key_value_heads)
        return rotate_half(k_BTKH, *cos_sin(self.config.rope, self.config.head_dim, positions_BT)), v_BTKH

    def output(self, heads_BTNH: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        return self.o_proj(heads_BTNH.reshape(*heads_BTNH.shape[:-2], -1))
