"""The Llama family: Llama 2 and 3, Qwen2 (biases on q, k, v), Qwen3 (a norm over each query and key head)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from flaxdraft.devices.sharding import Sharding
from flaxdraft.errors import InputError
from flaxdraft.nn.gqa import GQA, GQAConfig
from flaxdraft.nn.layers import GatedMLP
from flaxdraft.nn.precision import Precision
from flaxdraft.plugins import first_architecture
from flaxdraft.targets.decoder import DecoderConfig, Group
from flaxdraft.targets.pre_norm_layer import PreNormLayer

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
MODEL_TYPES = ("llama", "qwen2", "qwen3")

_LAYER = "model.layers.{i}."
NAME_TABLE = (
    ("embed", "model.embed_tokens.weight", "copy"),
    ("layers/input_layernorm/scale", _LAYER + "input_layernorm.weight", "copy"),
    ("layers/self_attn/q_proj/kernel", _LAYER + "self_attn.q_proj.weight", "transpose"),
    ("layers/self_attn/k_proj/kernel", _LAYER + "self_attn.k_proj.weight", "transpose"),
    ("layers/self_attn/v_proj/kernel", _LAYER + "self_attn.v_proj.weight", "transpose"),
    ("layers/self_attn/o_proj/kernel", _LAYER + "self_attn.o_proj.weight", "transpose"),
    ("layers/post_attention_layernorm/scale", _LAYER + "post_attention_layernorm.weight", "copy"),
    ("layers/mlp/gate_proj/kernel", _LAYER + "mlp.gate_proj.weight", "transpose"),
    ("layers/mlp/up_proj/kernel", _LAYER + "mlp.up_proj.weight", "transpose"),
    ("layers/mlp/down_proj/kernel", _LAYER + "mlp.down_proj.weight", "transpose"),
    ("norm/scale", "model.norm.weight", "copy"),
)
UNTIED_HEAD = (("head", "lm_head.weight", "copy"),)
QKV_BIAS = tuple((f"layers/self_attn/{p}_proj/bias", f"{_LAYER}self_attn.{p}_proj.bias", "copy") for p in "qkv")
OUT_BIAS = (("layers/self_attn/o_proj/bias", _LAYER + "self_attn.o_proj.bias", "copy"),)
MLP_BIAS = tuple(
    (f"layers/mlp/{p}_proj/bias", f"{_LAYER}mlp.{p}_proj.bias", "copy") for p in ("gate", "up", "down")
)  # fmt: skip
QK_NORM = tuple((f"layers/self_attn/{p}_norm/scale", f"{_LAYER}self_attn.{p}_norm.weight", "copy") for p in "qk")


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
                "is not supported; expected false"
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
        (not config.tie_word_embeddings, UNTIED_HEAD), (config.qkv_bias, QKV_BIAS), (config.out_bias, OUT_BIAS),
        (config.mlp_bias, MLP_BIAS), (config.qk_norm, QK_NORM),
    )  # fmt: skip
    return (*NAME_TABLE, *(line for wanted, rows in extras if wanted for line in rows))


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
    """Tensors that a file may hold and nobody needs: rotary tables of old files, the head's copy where it is tied."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight")
