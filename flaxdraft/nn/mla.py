"""Multi-head latent attention's projections (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Queries go through a low-rank bottleneck (or a plain projection where q_lora_rank is null); keys and values share
a normed latent plus one rotary key for all heads. Shape letters: B batch, T time, X input width, N heads,
P nope width, R rope width, H = P + R, C value width, L latent rank, D output width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from flaxdraft.devices.sharding import Sharding, along
from flaxdraft.errors import InputError
from flaxdraft.nn.layers import WHOLE, RMSNorm, column, latent, row
from flaxdraft.nn.precision import Precision
from flaxdraft.nn.rope import RopeConfig, cos_sin, rotate_interleaved


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    latent_norm_eps: float
    rope: RopeConfig
    attention_bias: bool = False  # on the projections to the latents and on the way out


def checked_rope(sizes: Any, field: str) -> RopeConfig:
    """The rotary embedding of a model with latent attention, YaRN's factors written out.

    Args:
        sizes: of the model, with these fields.
        field: where they were given, for the message.

    Raises:
        InputError: RoPE cannot turn pairs of its width, or readers differ in what YaRN's factors mean.
    """
    if sizes.qk_rope_head_dim % 2:
        raise InputError(f"{field}.qk_rope_head_dim: found {sizes.qk_rope_head_dim}, expected an even width")
    rope = sizes.rope
    if rope.rope_type != "yarn":
        return rope
    mscale = 1.0 if rope.mscale is None else rope.mscale
    # DeepSeek's own formula, which servers follow, is get_mscale(mscale) / get_mscale(mscale_all_dim), absent values
    # being 1 and 0; transformers drops the quotient unless both are set. Only where the two agree is the exported draft
    # the trained one.
    if rope.mscale is None if rope.mscale_all_dim else mscale != 1.0:
        raise InputError(
            f"draft rope: mscale {rope.mscale} with mscale_all_dim {rope.mscale_all_dim} means one thing to servers "
            "and another to transformers; set both or neither"
        )
    return dataclasses.replace(rope, mscale=mscale, mscale_all_dim=rope.mscale_all_dim or 0.0)


class Projected(NamedTuple):
    """What is made of the input directly, before any norm. Linear in the input: the projections of its parts add up."""

    q_BTF: Float[Array, "B T F"]  # the query's latent; the queries themselves where q_lora_rank is null
    kv_BTF: Float[Array, "B T F"]  # latent of keys and values, then the shared rotary key


class MLA(nnx.Module):
    """Expanded form: every head gets its own key, so training and cached decoding see ordinary heads."""

    def __init__(
        self, config: MLAConfig, num_in: int, num_out: int, precision: Precision, rngs: nnx.Rngs,
        sharding: Sharding = WHOLE,
    ):  # fmt: skip
        self.config = c = config
        self.sharding = s = sharding
        heads, width, bias = c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim, c.attention_bias
        if c.q_lora_rank is None:
            self.q_proj = column(num_in, heads * width, precision, rngs, s)
        else:
            self.q_a_proj = latent(num_in, c.q_lora_rank, precision, rngs, s, use_bias=bias)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, c.latent_norm_eps, precision)
            self.q_b_proj = column(c.q_lora_rank, heads * width, precision, rngs, s)
        latent_width = c.kv_lora_rank + c.qk_rope_head_dim
        self.kv_a_proj_with_mqa = latent(num_in, latent_width, precision, rngs, s, use_bias=bias)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, c.latent_norm_eps, precision)
        self.kv_b_proj = column(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim), precision, rngs, s)
        self.o_proj = row(heads * c.v_head_dim, num_out, precision, rngs, s, use_bias=bias)

    @property
    def softmax_scale(self) -> float:
        c = self.config
        return (c.qk_nope_head_dim + c.qk_rope_head_dim) ** -0.5 * c.rope.softmax_mscale()

    def project(self, x_BTX: Float[Array, "B T X"], inputs: slice = slice(None)) -> Projected:
        """
        Args:
            inputs: see `Linear`; only without biases may parts be added up.
        """
        q_proj = self.q_proj if self.config.q_lora_rank is None else self.q_a_proj
        return Projected(q_proj(x_BTX, inputs), self.kv_a_proj_with_mqa(x_BTX, inputs))

    def query(self, projected: Projected, positions_BT: Int[Array, "B T"]) -> Float[Array, "B T N H"]:
        c, flat = self.config, projected.q_BTF
        if c.q_lora_rank is not None:
            flat = self.q_b_proj(self.q_a_layernorm(flat))
        spec = along(flat, self.sharding.act_btnh)
        q_BTNH = flat.reshape(*flat.shape[:-1], c.num_attention_heads, -1, out_sharding=spec)
        nope, rope = q_BTNH[..., : c.qk_nope_head_dim], q_BTNH[..., c.qk_nope_head_dim :]
        rope = rotate_interleaved(rope, *cos_sin(c.rope, c.qk_rope_head_dim, positions_BT))
        return jnp.concatenate([nope, rope], axis=-1)

    def key_value(
        self, projected: Projected, positions_BT: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N C"]]:
        c, compressed = self.config, projected.kv_BTF
        latent_BTL, rope_BTR = compressed[..., : c.kv_lora_rank], compressed[..., c.kv_lora_rank :]
        rope_BT1R = rotate_interleaved(rope_BTR[:, :, None, :], *cos_sin(c.rope, c.qk_rope_head_dim, positions_BT))
        flat = self.kv_b_proj(self.kv_a_layernorm(latent_BTL))
        spec = along(flat, self.sharding.act_btnh)
        kv_BTNF = flat.reshape(*flat.shape[:-1], c.num_attention_heads, -1, out_sharding=spec)
        nope, v_BTNC = kv_BTNF[..., : c.qk_nope_head_dim], kv_BTNF[..., c.qk_nope_head_dim :]
        shape = (*nope.shape[:-1], c.qk_rope_head_dim)
        shared = jnp.broadcast_to(rope_BT1R, shape, out_sharding=spec)
        return jnp.concatenate([nope, shared], axis=-1), v_BTNC

    def output(self, heads_BTNC: Float[Array, "B T N C"]) -> Float[Array, "B T D"]:
        spec = along(heads_BTNC, self.sharding.act_btf)
        return self.o_proj(heads_BTNC.reshape(*heads_BTNC.shape[:-2], -1, out_sharding=spec))
