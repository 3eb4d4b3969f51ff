"""A target family that this project does not have, as somebody else's package would bring it: norms before and after
attention and feed-forward, a window on every second layer, sinks, scaled embeddings, a softmax scale of its own.

Shape letters: B batch, T time, E width, N query heads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx

from flaxdraft.devices.sharding import Sharding
from flaxdraft.nn.gqa import GQA, GQAConfig
from flaxdraft.nn.layers import GatedMLP, RMSNorm
from flaxdraft.nn.precision import Precision
from flaxdraft.nn.self_attention import self_attention
from flaxdraft.targets.decoder import DecoderConfig, Group

ARCHITECTURES = ("SandwichForCausalLM",)
MODEL_TYPES = ("sandwich",)
NO_WINDOW = 2**30

_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_PROJECTIONS = (*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down")))
NAME_TABLE = (
    ("embed", "model.embed_tokens.weight", "copy"),
    *((f"layers/{norm}/scale", "model.layers.{i}." + norm + ".weight", "copy") for norm in _NORMS),
    *((f"layers/{p.replace('.', '/')}/kernel", "model.layers.{i}." + p + ".weight", "transpose") for p in _PROJECTIONS),
    ("layers/sinks", "model.layers.{i}.self_attn.sinks", "copy"),
    ("norm/scale", "model.norm.weight", "copy"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    sliding_window: int
    query_pre_attn_scalar: float

    @classmethod
    def from_hf(cls, config: dict[str, Any], tap_layers: Sequence[int] = ()) -> Config:
        common = cls.common(config, tap_layers)
        scalar, window = config["query_pre_attn_scalar"], config["sliding_window"]
        return cls(**common, sliding_window=window, query_pre_attn_scalar=scalar)

    def before_layers(self, embeds_BTE):
        return embeds_BTE * math.sqrt(self.hidden_size)


class Heads(GQA):
    def __init__(self, query_pre_attn_scalar: float, *args):
        super().__init__(*args)
        self.query_pre_attn_scalar = query_pre_attn_scalar

    @property
    def softmax_scale(self) -> float:
        return self.query_pre_attn_scalar**-0.5


class Layer(nnx.Module):
    def __init__(self, config: Config, precision: Precision, sharding: Sharding, rngs: nnx.Rngs):
        self.config = c = config
        gqa = GQAConfig(c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rope)
        width = c.hidden_size
        self.self_attn = Heads(c.query_pre_attn_scalar, gqa, width, width, precision, rngs, sharding)
        self.mlp = GatedMLP(width, c.intermediate_size, precision, rngs, sharding)
        for norm in _NORMS:
            setattr(self, norm, RMSNorm(width, c.rms_norm_eps, precision))
        self.sinks = nnx.Param(jnp.zeros((c.num_attention_heads,), precision.param), place="weight_f")

    def __call__(self, x_BTE, positions_BT, attend, number):
        window = jnp.where(number % 2 == 1, self.config.sliding_window, NO_WINDOW)
        attend = partial(attend, window=window, sinks_N=self.sinks[...])
        attended = self_attention(self.self_attn, self.input_layernorm(x_BTE), positions_BT, attend)
        x_BTE = x_BTE + self.post_attention_layernorm(attended)
        return x_BTE + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x_BTE)))


def name_table(config: Config):
    return NAME_TABLE


def groups(config: Config, precision: Precision, sharding: Sharding) -> tuple[Group, ...]:
    make = lambda rngs: Layer(config, precision, sharding, rngs)  # noqa: E731
    return (Group("layers", range(config.num_hidden_layers), make),)


def num_experts(config: Config) -> int:
    return 0


def ignored(config: Config, name: str) -> bool:
    return False
