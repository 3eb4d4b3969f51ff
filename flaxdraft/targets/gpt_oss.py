"""gpt-oss: windows on every second layer, a sink in each head's softmax, biases everywhere, experts with a clamped
feed-forward. Its published weights are MXFP4 (`files.mxfp4`).

Shape letters: P pairs of a token and an expert, D width, X experts, F feed-forward of one expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flaxdraft.devices.sharding import Sharding
from flaxdraft.nn.gqa import GQA, GQAConfig
from flaxdraft.nn.moe import MoE, MoEConfig, SortedPairs, Weights
from flaxdraft.nn.precision import Precision
from flaxdraft.targets import common_names
from flaxdraft.targets.common_names import LAYER
from flaxdraft.targets.decoder import DecoderConfig, Group
from flaxdraft.targets.fields import check_positive
from flaxdraft.targets.layer_windows import FULL, SLIDING, Windows, layer_windows, windowed
from flaxdraft.targets.pre_norm_layer import PreNormLayer

ARCHITECTURES = ("GptOssForCausalLM",)
MODEL_TYPES = ("gpt_oss",)

_OWN = (
    ("layers/sinks", LAYER + "self_attn.sinks", "copy"),
    ("layers/mlp/gate/kernel", LAYER + "mlp.router.weight", "transpose"),
    ("layers/mlp/gate/bias", LAYER + "mlp.router.bias", "copy"),
    ("layers/mlp/experts/gate_up_proj", LAYER + "mlp.experts.gate_up_proj", "copy"),
    ("layers/mlp/experts/gate_up_bias", LAYER + "mlp.experts.gate_up_proj_bias", "copy"),
    ("layers/mlp/experts/down_proj", LAYER + "mlp.experts.down_proj", "copy"),
    ("layers/mlp/experts/down_bias", LAYER + "mlp.experts.down_proj_bias", "copy"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """One model of the family; `intermediate_size` is of one expert."""

    attention_bias: bool
    windows: Windows
    moe: MoEConfig
    swiglu_alpha: float
    swiglu_limit: float

    @classmethod
    def from_hf(cls, config: dict[str, Any], tap_layers: Sequence[int] = ()) -> Config:
        """
        Raises:
            InputError: see `DecoderConfig.common` and `layer_windows`; the experts have no number.
        """
        common = cls.common(config, tap_layers)
        check_positive(config, "num_local_experts", "num_experts_per_tok")
        usual = [FULL if i % 2 else SLIDING for i in range(common["num_hidden_layers"])]
        return cls(
            **common,
            attention_bias=bool(config.get("attention_bias", True)),
            windows=layer_windows(config, config.get("sliding_window", 128), usual),
            moe=MoEConfig(
                config["num_local_experts"], config["num_experts_per_tok"], common["intermediate_size"],
                "softmax_of_chosen", norm_topk_prob=False,
            ),
            swiglu_alpha=float(config.get("swiglu_alpha", 1.702)),
            swiglu_limit=float(config.get("swiglu_limit", 7.0)),
        )  # fmt: skip


class ClampedExperts(nnx.Module):
    """down((up + 1) * gate * sigmoid(alpha * gate)) of each expert, gate and up clamped; a `nn.moe.Feed`. Gate and up
    are one product, whose outputs alternate."""

    def __init__(
        self, config: MoEConfig, width: int, precision: Precision, rngs: nnx.Rngs, *, alpha: float, limit: float
    ):
        self.alpha, self.limit = alpha, limit
        num, inner, init = config.num_experts, config.moe_intermediate_size, nnx.initializers.normal(0.02)
        make = lambda place, *shape: nnx.Param(  # noqa: E731
            init(rngs.params(), (num, *shape), precision.param), place=place
        )
        self.gate_up_proj = make("weight_xdf", width, 2 * inner)
        self.gate_up_bias = make("weight_xf", 2 * inner)
        self.down_proj = make("weight_xfd", inner, width)
        self.down_bias = make("weight_xd", width)

    def apply(self, weights: Weights, x_PD, pairs: SortedPairs, adds_bias):
        gate_up_PF = lax.ragged_dot(x_PD, weights["gate_up_proj"], pairs.sizes_X)
        gate_up_PF += weights["gate_up_bias"][pairs.expert_P]
        gate_PF = jnp.minimum(gate_up_PF[:, ::2], self.limit)
        up_PF = jnp.clip(gate_up_PF[:, 1::2], -self.limit, self.limit)
        inner_PF = (up_PF + 1) * gate_PF * jax.nn.sigmoid(gate_PF * self.alpha)
        out_PD = lax.ragged_dot(inner_PF, weights["down_proj"], pairs.sizes_X)
        return out_PD + jnp.where(adds_bias, weights["down_bias"][pairs.expert_P], 0)


class Layer(PreNormLayer):
    """See `decoder.Layer`."""

    def __init__(self, config: Config, attention: GQA, mlp: MoE, precision: Precision):
        super().__init__(config, attention, mlp, precision)
        self.windows = config.windows
        self.sinks = nnx.Param(jnp.zeros((config.num_attention_heads,), precision.param), place="weight_f")

    def __call__(self, x_BTE, positions_BT, attend, number):
        attend = partial(windowed(attend, self.windows, number), sinks_N=self.sinks[...])
        return super().__call__(x_BTE, positions_BT, attend, number)


def name_table(config: Config):
    """The rows for this model."""
    biases = (*common_names.QKV_BIAS, *common_names.OUT_BIAS)
    return (
        *common_names.OUTSIDE, *common_names.head(config), *common_names.LAYER_NORMS, *common_names.ATTENTION,
        *(biases if config.attention_bias else ()), *_OWN,
    )  # fmt: skip


def groups(config: Config, precision: Precision, sharding: Sharding) -> tuple[Group, ...]:
    """All layers are alike, but for their windows."""
    c = config
    attention = GQAConfig(
        c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rope, c.attention_bias, c.attention_bias
    )
    experts = partial(ClampedExperts, alpha=c.swiglu_alpha, limit=c.swiglu_limit)

    def make(rngs):
        gqa = GQA(attention, c.hidden_size, c.hidden_size, precision, rngs, sharding)
        return Layer(c, gqa, MoE(c.moe, c.hidden_size, precision, rngs, sharding, experts), precision)

    return (Group("layers", range(c.num_hidden_layers), make),)


def num_experts(config: Config) -> int:
    return config.moe.num_experts


def ignored(config: Config, name: str) -> bool:
    return common_names.needless(config, name)
