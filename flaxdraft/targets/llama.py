"""The Llama family: Llama 2 and 3, Qwen2 (biases on q, k, v), Qwen3 (a norm over each query and key head)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from flaxdraft.devices.sharding import Sharding
from flaxdraft.errors import InputError
from flaxdraft.files.through_an_engine import THROUGH_AN_ENGINE
from flaxdraft.nn.gqa import GQA, GQAConfig
from flaxdraft.nn.layers import GatedMLP
from flaxdraft.nn.precision import Precision
from flaxdraft.plugins import first_architecture
from flaxdraft.targets import common_names
from flaxdraft.targets.decoder import DecoderConfig, Group
from flaxdraft.targets.pre_norm_layer import PreNormLayer

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
MODEL_TYPES = ("llama", "qwen2", "qwen3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """One model of the family."""

    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @classmethod
    def from_hf(cls, config: dict[str, Any], tap_layers: Sequence[int] = ()) -> Config:
        """
        Raises:
            InputError: see `DecoderConfig.common`; attention over a window that some layer would really use.
        """
        kind = _kind(config)
        common = cls.common(config, tap_layers)
        if config.get("use_sliding_window") and config.get("max_window_layers", 0) < common["num_hidden_layers"]:
            raise InputError(
                f"target config: use_sliding_window is true from layer {config.get('max_window_layers', 0)} on, which "
                f"is not supported; expected false. {THROUGH_AN_ENGINE}"
            )
        if kind == "qwen3":
            common["head_dim"] = config.get("head_dim") or 128
        bias = bool(config.get("attention_bias", False))
        return cls(
            **common, qkv_bias=bias or kind == "qwen2", out_bias=bias and kind != "qwen2",
            mlp_bias=bool(config.get("mlp_bias", False)), qk_norm=kind == "qwen3",
        )  # fmt: skip


def _kind(config: dict[str, Any]) -> str:
    """llama, qwen2 or qwen3: by the architecture where it is one of ours, else by the model type."""
    named: dict[str | None, str] = dict(zip(ARCHITECTURES, MODEL_TYPES, strict=True))
    return named.get(first_architecture(config)) or config.get("model_type", "llama")


def name_table(config: Config):
    """The rows for this model."""
    extras = (
        (config.qkv_bias, common_names.QKV_BIAS), (config.out_bias, common_names.OUT_BIAS),
        (config.mlp_bias, common_names.GATED_MLP_BIAS), (config.qk_norm, common_names.QK_NORM),
    )  # fmt: skip
    return (
        *common_names.OUTSIDE, *common_names.head(config), *common_names.LAYER_NORMS, *common_names.ATTENTION,
        *common_names.GATED_MLP, *(line for wanted, rows in extras if wanted for line in rows),
    )  # fmt: skip


def groups(config: Config, precision: Precision, sharding: Sharding) -> tuple[Group, ...]:
    """All layers are alike."""
    c = config
    attention = GQAConfig(
        c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rope, c.qkv_bias, c.out_bias,
        c.rms_norm_eps if c.qk_norm else None,
    )  # fmt: skip

    def make(rngs):
        gqa = GQA(attention, c.hidden_size, c.hidden_size, precision, rngs, sharding)
        mlp = GatedMLP(c.hidden_size, c.intermediate_size, precision, rngs, sharding, use_bias=c.mlp_bias)
        return PreNormLayer(c, gqa, mlp, precision)

    return (Group("layers", range(c.num_hidden_layers), make),)


def num_experts(config: Config) -> int:
    return 0


def ignored(config: Config, name: str) -> bool:
    return common_names.needless(config, name)
