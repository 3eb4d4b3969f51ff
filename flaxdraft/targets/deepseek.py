"""DeepSeek-V2, V3, R1 and Kimi-K2: latent attention, first layers dense, then routed and shared experts.

The multi-token prediction layers that V3's files hold behind the last one are left out, as transformers does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from flaxdraft.devices.sharding import Sharding
from flaxdraft.errors import InputError
from flaxdraft.nn.layers import GatedMLP
from flaxdraft.nn.mla import MLA, MLAConfig
from flaxdraft.nn.moe import MoE, MoEConfig
from flaxdraft.nn.precision import Precision
from flaxdraft.plugins import first_architecture
from flaxdraft.targets import common_names
from flaxdraft.targets.common_names import LAYER
from flaxdraft.targets.decoder import DecoderConfig, Group
from flaxdraft.targets.fields import check_only, check_positive
from flaxdraft.targets.pre_norm_layer import PreNormLayer

ARCHITECTURES = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "kimi_k2")
LATENT_NORM_EPS = 1e-6  # transformers' and DeepSeek's own models hard-code it, whatever rms_norm_eps says


def _both(rows) -> tuple:
    """A layer's rows for the dense group and for the group with experts."""
    return tuple((f"{group}/{path}", LAYER + key, how) for group in ("dense", "moe") for path, key, how in rows)


_ALWAYS = (
    ("input_layernorm/scale", "input_layernorm.weight", "copy"),
    ("post_attention_layernorm/scale", "post_attention_layernorm.weight", "copy"),
    ("self_attn/kv_a_proj_with_mqa/kernel", "self_attn.kv_a_proj_with_mqa.weight", "transpose"),
    ("self_attn/kv_a_layernorm/scale", "self_attn.kv_a_layernorm.weight", "copy"),
    ("self_attn/kv_b_proj/kernel", "self_attn.kv_b_proj.weight", "transpose"),
    ("self_attn/o_proj/kernel", "self_attn.o_proj.weight", "transpose"),
)
_LOW_RANK_QUERY = (
    ("self_attn/q_a_proj/kernel", "self_attn.q_a_proj.weight", "transpose"),
    ("self_attn/q_a_layernorm/scale", "self_attn.q_a_layernorm.weight", "copy"),
    ("self_attn/q_b_proj/kernel", "self_attn.q_b_proj.weight", "transpose"),
)
_PLAIN_QUERY = (("self_attn/q_proj/kernel", "self_attn.q_proj.weight", "transpose"),)
_BIASES = (
    ("self_attn/kv_a_proj_with_mqa/bias", "self_attn.kv_a_proj_with_mqa.bias", "copy"),
    ("self_attn/o_proj/bias", "self_attn.o_proj.bias", "copy"),
)
_QUERY_BIAS = (("self_attn/q_a_proj/bias", "self_attn.q_a_proj.bias", "copy"),)
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_DENSE = tuple((f"dense/mlp/{p}/kernel", f"{LAYER}mlp.{p}.weight", "transpose") for p in _PROJECTIONS)
_SHARED = tuple(
    (f"moe/mlp/shared_experts/{p}/kernel", f"{LAYER}mlp.shared_experts.{p}.weight", "transpose") for p in _PROJECTIONS
)
_CHOICE_BIAS = (("moe/mlp/gate/bias", LAYER + "mlp.gate.e_score_correction_bias", "copy"),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """One model of the family. `head_dim` is a query's whole width."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    attention_bias: bool
    first_k_dense_replace: int
    moe: MoEConfig | None  # None where every layer is dense

    @property
    def value_width(self) -> int:
        return self.v_head_dim

    @classmethod
    def from_hf(cls, config: dict[str, Any], tap_layers: Sequence[int] = ()) -> Config:
        """
        Raises:
            InputError: see `DecoderConfig.common`; a layout or routing that no published model of the family has.
        """
        version3 = _is_version3(config)
        check_positive(config, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        for name, only in (("moe_layer_freq", 1), ("rope_interleave", True)):
            check_only(config, name, (only,))
        common = cls.common(config, tap_layers)
        common["num_key_value_heads"] = common["num_attention_heads"]  # after expansion every head has its own
        common["head_dim"] = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
        dense = min(config.get("first_k_dense_replace", 3 if version3 else 0), common["num_hidden_layers"])
        return cls(
            **common,
            q_lora_rank=config.get("q_lora_rank"),
            kv_lora_rank=config["kv_lora_rank"],
            qk_nope_head_dim=config["qk_nope_head_dim"],
            qk_rope_head_dim=config["qk_rope_head_dim"],
            v_head_dim=config["v_head_dim"],
            attention_bias=bool(config.get("attention_bias", False)),
            first_k_dense_replace=dense,
            moe=None if dense == common["num_hidden_layers"] else _moe(config, version3),
        )


def _is_version3(config: dict[str, Any]) -> bool:
    architecture = first_architecture(config)
    if architecture in ARCHITECTURES:
        return architecture == "DeepseekV3ForCausalLM"
    return config.get("model_type") != "deepseek_v2"


def _moe(config: dict[str, Any], version3: bool) -> MoEConfig:
    routing = "noaux_tc" if version3 else config.get("topk_method", "greedy")
    expected = {"topk_method": ("noaux_tc",) if version3 else ("greedy", "group_limited_greedy"),
                "scoring_func": ("sigmoid",) if version3 else ("softmax",)}  # fmt: skip
    for name, known in expected.items():
        check_only(config, name, known)
    check_positive(config, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
    experts, group_count = config["n_routed_experts"], config.get("n_group") or 1
    if experts % group_count:
        raise InputError(f"target config: n_group: {group_count} groups do not divide {experts} experts")
    return MoEConfig(
        num_experts=experts,
        num_experts_per_tok=config["num_experts_per_tok"],
        moe_intermediate_size=config["moe_intermediate_size"],
        n_shared_experts=config.get("n_shared_experts") or 0,
        routing=routing,
        n_group=group_count,
        topk_group=config.get("topk_group") or 1,
        norm_topk_prob=version3 and bool(config.get("norm_topk_prob", True)),  # version 2 never normalises
        routed_scaling_factor=float(config.get("routed_scaling_factor", 1.0)),
    )


def name_table(config: Config):
    """The rows for this model."""
    low_rank = config.q_lora_rank is not None
    rows = (*_ALWAYS, *(_LOW_RANK_QUERY if low_rank else _PLAIN_QUERY))
    if config.attention_bias:
        rows = (*rows, *_BIASES, *(_QUERY_BIAS if low_rank else ()))
    table = (*common_names.OUTSIDE, *common_names.head(config), *_both(rows), *_DENSE)
    if config.moe is not None:
        table += (*common_names.routed_experts("moe"), *(_SHARED if config.moe.n_shared_experts else ()))
        table += _CHOICE_BIAS if config.moe.routing == "noaux_tc" else ()
    present = {group.name for group in groups(config, Precision(), Sharding.none())} | {"embed", "head", "norm"}
    return tuple(row for row in table if row[0].split("/")[0] in present)


def groups(config: Config, precision: Precision, sharding: Sharding) -> tuple[Group, ...]:
    """Dense layers, then layers with experts; either may be absent."""
    c = config
    names = [field.name for field in dataclasses.fields(MLAConfig) if field.name != "latent_norm_eps"]
    attention = MLAConfig(**{name: getattr(c, name) for name in names}, latent_norm_eps=LATENT_NORM_EPS)

    def layer(rngs, mlp):
        return PreNormLayer(c, MLA(attention, c.hidden_size, c.hidden_size, precision, rngs, sharding), mlp, precision)

    def dense(rngs):
        return layer(rngs, GatedMLP(c.hidden_size, c.intermediate_size, precision, rngs, sharding))

    def moe(rngs):
        assert c.moe is not None, "layers with experts are where the config has them"
        return layer(rngs, MoE(c.moe, c.hidden_size, precision, rngs, sharding))

    first = c.first_k_dense_replace
    both = Group("dense", range(first), dense), Group("moe", range(first, c.num_hidden_layers), moe)
    return tuple(group for group in both if len(group.layers))


def num_experts(config: Config) -> int:
    return 0 if config.moe is None else config.moe.num_experts


def ignored(config: Config, name: str) -> bool:
    """Tensors that nobody needs: layers of multi-token prediction, rotary tables of old files, a tied head's copy."""
    layer = name.removeprefix("model.layers.").split(".")[0]
    beyond = name.startswith("model.layers.") and layer.isdigit() and int(layer) >= config.num_hidden_layers
    return beyond or common_names.needless(config, name)
