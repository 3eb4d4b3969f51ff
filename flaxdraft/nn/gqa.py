"""Grouped-query attention's projections (Llama family).

Shape letters: B batch, T time, X input width, N query heads, K key/value heads, H head width, F = N H,
D output width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from flaxdraft.devices.sharding import Sharding, along, into_columns
from flaxdraft.errors import InputError
from flaxdraft.nn.layers import WHOLE, RMSNorm, column, row
from flaxdraft.nn.precision import Precision
from flaxdraft.nn.rope import RopeConfig, cos_sin, rotate_half


@dataclasses.dataclass(frozen=True)
class GQAConfig:
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: RopeConfig | None  # None: who attends turns queries and keys
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm_eps: float | None = None  # of one RMSNorm over each query and key head, before rotation (Qwen3)
    norm_offset: float = 0.0  # of these, see `RMSNorm`


def check_grouped(sizes: Any, field: str) -> None:
    """
    Args:
        sizes: of a model, with these fields.
        field: where they were given, for the message.

    Raises:
        InputError: the key/value heads have no even share of the query heads, or RoPE cannot turn pairs of a head.
    """
    heads, kv_heads = sizes.num_attention_heads, sizes.num_key_value_heads
    if heads % kv_heads:
        raise InputError(f"{field}.num_key_value_heads: {kv_heads} does not divide num_attention_heads {heads}")
    if sizes.head_dim % 2:
        raise InputError(f"{field}.head_dim: found {sizes.head_dim}, expected an even width (RoPE turns pairs)")


class Projected(NamedTuple):
    """Queries, keys and values before they are cut into heads and rotated. Linear in the input: the projections of the
    parts of an input add up."""

    q_BTF: Float[Array, "B T F"]
    k_BTF: Float[Array, "B T F"]
    v_BTF: Float[Array, "B T F"]


class GQA(nnx.Module):
    """q, k, v and output projections with rotary positions; the softmax itself is an operation of ops/."""

    def __init__(
        self, config: GQAConfig, num_in: int, num_out: int, precision: Precision, rngs: nnx.Rngs,
        sharding: Sharding = WHOLE,
    ):  # fmt: skip
        self.config, self.sharding = config, sharding
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = column(num_in, width, precision, rngs, sharding, use_bias=config.qkv_bias)
        self.k_proj = column(num_in, kv_width, precision, rngs, sharding, use_bias=config.qkv_bias)
        self.v_proj = column(num_in, kv_width, precision, rngs, sharding, use_bias=config.qkv_bias)
        self.o_proj = row(width, num_out, precision, rngs, sharding, use_bias=config.out_bias)
        if config.qk_norm_eps is not None:
            self.q_norm = RMSNorm(config.head_dim, config.qk_norm_eps, precision, config.norm_offset)
            self.k_norm = RMSNorm(config.head_dim, config.qk_norm_eps, precision, config.norm_offset)

    @property
    def softmax_scale(self) -> float:
        return self.config.head_dim**-0.5

    def _heads(self, flat_BTF, num: int):
        shape = (*flat_BTF.shape[:-1], num, self.config.head_dim)
        return jnp.reshape(flat_BTF, shape, out_sharding=along(flat_BTF, self.sharding.act_btnh))

    def _rotated(self, x_BTNH, positions_BT):
        if self.config.rope is None:
            return x_BTNH
        return rotate_half(x_BTNH, *cos_sin(self.config.rope, self.config.head_dim, positions_BT))

    def project(self, x_BTX: Float[Array, "B T X"], inputs: slice = slice(None)) -> Projected:
        """
        Args:
            inputs: see `Linear`; only without biases may parts be added up.
        """
        x_BTX = into_columns(x_BTX, self.sharding.act_btf)
        return Projected(*(projection(x_BTX, inputs) for projection in (self.q_proj, self.k_proj, self.v_proj)))

    def query(self, projected: Projected, positions_BT: Int[Array, "B T"]) -> Float[Array, "B T N H"]:
        q_BTNH = self._heads(projected.q_BTF, self.config.num_attention_heads)
        if self.config.qk_norm_eps is not None:
            q_BTNH = self.q_norm(q_BTNH)
        return self._rotated(q_BTNH, positions_BT)

    def key_value(
        self, projected: Projected, positions_BT: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        k_BTKH = self._heads(projected.k_BTF, self.config.num_key_value_heads)
        v_BTKH = self._heads(projected.v_BTF, self.config.num_key_value_heads)
        if self.config.qk_norm_eps is not None:
            k_BTKH = self.k_norm(k_BTKH)
        return self._rotated(k_BTKH, positions_BT), v_BTKH

    def output(self, heads_BTNH: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        spec = along(heads_BTNH, self.sharding.act_btf)
        return self.o_proj(heads_BTNH.reshape(*heads_BTNH.shape[:-2], -1, out_sharding=spec))
