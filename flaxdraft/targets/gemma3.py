"""Gemma 3, text alone (270m, 1B): norms before and after attention and feed-forward, scaled embeddings, a window and a
rotary embedding of its own for most layers.

Shape letters: B batch, T time, E width, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flaxdraft.devices.sharding import Sharding
from flaxdraft.errors import InputError
from flaxdraft.nn.gqa import GQA, GQAConfig
from flaxdraft.nn.layers import GatedMLP, RMSNorm
from flaxdraft.nn.precision import Precision
from flaxdraft.nn.rope import RopeConfig, cos_sin, rotate_half
from flaxdraft.nn.self_attention import self_attention
from flaxdraft.targets import common_names
from flaxdraft.targets.common_names import LAYER
from flaxdraft.targets.decoder import DecoderConfig, Group
from flaxdraft.targets.fields import check_only
from flaxdraft.targets.layer_windows import FULL, SLIDING, Windows, layer_windows, windowed

ARCHITECTURES = ("Gemma3ForCausalLM",)
MODEL_TYPES = ("gemma3_text",)
NORM_OFFSET = 1.0
GLOBAL_THETA, LOCAL_THETA = 1e6, 1e4  # where config.json names none

_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_NORM_NAMES = tuple((f"layers/{norm}/scale", f"{LAYER}{norm}.weight", "copy") for norm in _NORMS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """One model of the family; `rope` is of layers without a window."""

    attention_bias: bool
    windows: Windows
    local_rope: RopeConfig
    query_pre_attn_scalar: float

    @classmethod
    def from_hf(cls, config: dict[str, Any], tap_layers: Sequence[int] = ()) -> Config:
        """
        Raises:
            InputError: see `DecoderConfig.common` and `layer_windows`; a cap on scores or logits, or attention both
                ways, which no published model of the family has.
        """
        check_only(config, "hidden_activation", ("gelu_pytorch_tanh",))
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            check_only(config, name, (None,))
        check_only(config, "use_bidirectional_attention", (False, None))
        config = {
            "tie_word_embeddings": True,
            "head_dim": 256,
        } | config  # transformers' defaults, which files leave out
        ropes = _ropes(config)
        common = cls.common(config | ropes[FULL], tap_layers)
        pattern = config.get("sliding_window_pattern") or 6
        usual = [SLIDING if (i + 1) % pattern else FULL for i in range(common["num_hidden_layers"])]
        return cls(
            **common,
            attention_bias=bool(config.get("attention_bias", False)),
            windows=layer_windows(config, config.get("sliding_window", 4096), usual),
            local_rope=RopeConfig.from_hf(config | ropes[SLIDING]),
            query_pre_attn_scalar=config.get("query_pre_attn_scalar", 256),
        )

    @property
    def norm_offset(self) -> float:
        return NORM_OFFSET

    @property
    def context(self) -> int:
        """What config.json says: its scaling is counted in already."""
        return self.max_position_embeddings

    def before_layers(self, embeds_BTE: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        return embeds_BTE * jnp.asarray(math.sqrt(self.hidden_size), embeds_BTE.dtype)


def _ropes(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The fields of both rotary embeddings, as `RopeConfig.from_hf` reads them: each kind of layer has its own under
    `rope_parameters`, or, in older files, two bases and a scaling of the layers without a window.

    Raises:
        InputError: `rope_parameters` is not of both kinds.
    """
    own = config.get("rope_parameters")
    if own:
        if not all(isinstance(own.get(kind), dict) for kind in (FULL, SLIDING)):
            raise InputError(
                f"target config: rope_parameters: found {own!r}, expected one object for {FULL} and one for {SLIDING}; "
                "fetch config.json again"
            )
        return {kind: {"rope_parameters": own[kind], "rope_scaling": None} for kind in (FULL, SLIDING)}
    bases = {FULL: config.get("rope_theta", GLOBAL_THETA), SLIDING: config.get("rope_local_base_freq", LOCAL_THETA)}
    scalings = {FULL: config.get("rope_scaling"), SLIDING: None}
    return {kind: {"rope_theta": bases[kind], "rope_scaling": scalings[kind]} for kind in bases}


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


class Heads(GQA):
    """Whose softmax has a scale of its own."""

    def __init__(self, query_pre_attn_scalar: float, *args: Any):
        super().__init__(*args)
        self.query_pre_attn_scalar = query_pre_attn_scalar

    @property
    def softmax_scale(self) -> float:
        return self.query_pre_attn_scalar**-0.5


class Layer(nnx.Module):
    """See `decoder.Layer`."""

    def __init__(self, config: Config, attention: Heads, mlp: GatedMLP, precision: Precision):
        self.config, self.self_attn, self.mlp = config, attention, mlp
        norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps, precision, NORM_OFFSET)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()

    def __call__(self, x_BTE, positions_BT, attend, number):
        c, inside = self.config, windowed(attend, self.config.windows, number)
        slides = jnp.asarray([window is not None for window in c.windows])[number]
        local, whole = (cos_sin(rope, c.head_dim, positions_BT) for rope in (c.local_rope, c.rope))
        angles = jax.tree.map(lambda one, other: jnp.where(slides, one, other), local, whole)

        def turned(q_BTNH, k_BTKH, v_BTKC, scale, **more):
            return inside(rotate_half(q_BTNH, *angles), rotate_half(k_BTKH, *angles), v_BTKC, scale, **more)

        attended = self_attention(self.self_attn, self.input_layernorm(x_BTE), positions_BT, turned)
        x_BTE = x_BTE + self.post_attention_layernorm(attended)
        return x_BTE + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x_BTE)))


def name_table(config: Config):
    """The rows for this model."""
    biases = (*common_names.QKV_BIAS, *common_names.OUT_BIAS)
    return (
        *common_names.OUTSIDE, *common_names.head(config), *_NORM_NAMES, *common_names.ATTENTION,
        *common_names.QK_NORM, *(biases if config.attention_bias else ()), *common_names.GATED_MLP,
    )  # fmt: skip


def groups(config: Config, precision: Precision, sharding: Sharding) -> tuple[Group, ...]:
    """All layers are alike, but for their windows and angles."""
    c = config
    attention = GQAConfig(
        c.num_attention_heads, c.num_key_value_heads, c.head_dim, None, c.attention_bias, c.attention_bias,
        c.rms_norm_eps, NORM_OFFSET,
    )  # fmt: skip

    def make(rngs):
        heads = Heads(c.query_pre_attn_scalar, attention, c.hidden_size, c.hidden_size, precision, rngs, sharding)
        mlp = GatedMLP(c.hidden_size, c.intermediate_size, precision, rngs, sharding, activation=_gelu)
        return Layer(c, heads, mlp, precision)

    return (Group("layers", range(c.num_hidden_layers), make),)


def num_experts(config: Config) -> int:
    return 0


def ignored(config: Config, name: str) -> bool:
    return common_names.needless(config, name)
