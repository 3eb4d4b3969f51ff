"""Mistral and Ministral: Llama's layers without biases, which may see a sliding window each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from flaxdraft.devices.sharding import Sharding
from flaxdraft.nn.gqa import GQA, GQAConfig
from flaxdraft.nn.layers import GatedMLP
from flaxdraft.nn.precision import Precision
from flaxdraft.targets import common_names
from flaxdraft.targets.decoder import DecoderConfig, Group
from flaxdraft.targets.layer_windows import FULL, SLIDING, Windows, layer_windows, windowed
from flaxdraft.targets.pre_norm_layer import PreNormLayer

ARCHITECTURES = ("MistralForCausalLM", "MinistralForCausalLM")
MODEL_TYPES = ("mistral", "ministral")
USUAL_WINDOW = 4096  # of a config.json without the field, as transformers has it; null there is none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """One model of the family."""

    windows: Windows

    @classmethod
    def from_hf(cls, config: dict[str, Any], tap_layers: Sequence[int] = ()) -> Config:
        """
        Raises:
            InputError: see `DecoderConfig.common` and `layer_windows`.
        """
        common = cls.common(config, tap_layers)
        window = config.get("sliding_window", USUAL_WINDOW)
        usual = [FULL if window is None else SLIDING] * common["num_hidden_layers"]
        return cls(**common, windows=layer_windows(config, window, usual))


class Layer(PreNormLayer):
    """See `decoder.Layer`."""

    def __init__(self, config: Config, attention: GQA, mlp: GatedMLP, precision: Precision):
        super().__init__(config, attention, mlp, precision)
        self.windows = config.windows

    def __call__(self, x_BTE, positions_BT, attend, number):
        return super().__call__(x_BTE, positions_BT, windowed(attend, self.windows, number), number)


def name_table(config: Config):
    """The rows for this model."""
    return (
        *common_names.OUTSIDE, *common_names.head(config), *common_names.LAYER_NORMS, *common_names.ATTENTION,
        *common_names.GATED_MLP,
    )  # fmt: skip


def groups(config: Config, precision: Precision, sharding: Sharding) -> tuple[Group, ...]:
    """All layers are alike, but for their windows."""
    c = config
    attention = GQAConfig(c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rope)

    def make(rngs):
        gqa = GQA(attention, c.hidden_size, c.hidden_size, precision, rngs, sharding)
        return Layer(c, gqa, GatedMLP(c.hidden_size, c.intermediate_size, precision, rngs, sharding), precision)

    return (Group("layers", range(c.num_hidden_layers), make),)


def num_experts(config: Config) -> int:
    return 0


def ignored(config: Config, name: str) -> bool:
    return common_names.needless(config, name)
