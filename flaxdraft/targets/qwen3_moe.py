"""Qwen3 with experts (Qwen3-30B-A3B, 235B-A22B, Qwen3-Coder): Qwen3's attention, and routed experts in every layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from flaxdraft.devices.sharding import Sharding
from flaxdraft.nn.gqa import GQA, GQAConfig
from flaxdraft.nn.moe import MoE, MoEConfig
from flaxdraft.nn.precision import Precision
from flaxdraft.targets import common_names
from flaxdraft.targets.decoder import DecoderConfig, Group
from flaxdraft.targets.fields import check_only, check_positive
from flaxdraft.targets.pre_norm_layer import PreNormLayer

ARCHITECTURES = ("Qwen3MoeForCausalLM",)
MODEL_TYPES = ("qwen3_moe",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """One model of the family; `intermediate_size` is of dense layers, which no published model has."""

    attention_bias: bool
    moe: MoEConfig

    @classmethod
    def from_hf(cls, config: dict[str, Any], tap_layers: Sequence[int] = ()) -> Config:
        """
        Raises:
            InputError: see `DecoderConfig.common`; dense layers or windows, which no published model of the family has.
        """
        named = "num_experts" if "num_experts" in config else "num_local_experts"  # as transformers 5 writes it
        check_positive(config, named, "num_experts_per_tok", "moe_intermediate_size")
        check_only(config, "decoder_sparse_step", (1,))
        check_only(config, "mlp_only_layers", ([], None))
        check_only(config, "use_sliding_window", (False,))
        return cls(
            **cls.common(config, tap_layers),
            attention_bias=bool(config.get("attention_bias", False)),
            moe=MoEConfig(
                config[named], config["num_experts_per_tok"], config["moe_intermediate_size"], "greedy",
                norm_topk_prob=bool(config.get("norm_topk_prob", False)),
            ),
        )  # fmt: skip


def name_table(config: Config):
    """The rows for this model."""
    biases = (*common_names.QKV_BIAS, *common_names.OUT_BIAS)
    return (
        *common_names.OUTSIDE, *common_names.head(config), *common_names.LAYER_NORMS, *common_names.ATTENTION,
        *common_names.QK_NORM, *(biases if config.attention_bias else ()), *common_names.routed_experts("layers"),
    )  # fmt: skip


def groups(config: Config, precision: Precision, sharding: Sharding) -> tuple[Group, ...]:
    """All layers are alike."""
    c = config
    attention = GQAConfig(
        c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rope, c.attention_bias, c.attention_bias,
        c.rms_norm_eps,
    )  # fmt: skip

    def make(rngs):
        gqa = GQA(attention, c.hidden_size, c.hidden_size, precision, rngs, sharding)
        return PreNormLayer(c, gqa, MoE(c.moe, c.hidden_size, precision, rngs, sharding), precision)

    return (Group("layers", range(c.num_hidden_layers), make),)


def num_experts(config: Config) -> int:
    return config.moe.num_experts


def ignored(config: Config, name: str) -> bool:
    return common_names.needless(config, name)
