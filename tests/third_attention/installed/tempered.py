"""A third attention on the EAGLE-3 surface, for tests: all heads share one key and value, and each has a learned
temperature. It stands in this file alone, outside the package, which finds it through its entry point.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from flaxdraft.algorithms.eagle3.draft import COMMON_NAMES, Eagle3Draft, Eagle3Sizes, extra_names
from flaxdraft.algorithms.eagle3.serving.terms import SWITCHES, Kind, Served, Shapes
from flaxdraft.devices.sharding import Sharding
from flaxdraft.interfaces import EmbeddingAndHead
from flaxdraft.nn.gqa import GQA, GQAConfig, Projected
from flaxdraft.nn.precision import Precision
from flaxdraft.nn.rope import RopeConfig

ARCHITECTURES = ("TemperedForCausalLMEagle3",)
MODEL_TYPES = ("tempered",)
SERVING_ARCHITECTURE = ARCHITECTURES[0]
OWN_NAMES = (
    *((f"self_attn/{name}/kernel", f"midlayer.self_attn.{name}.weight", "transpose")
      for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    ("self_attn/temperature", "midlayer.self_attn.temperature", "copy"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Eagle3Sizes):
    """Sizes."""

    num_attention_heads: int
    head_dim: int
    rope: RopeConfig

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Config:
        own = {name: config[name] for name in ("num_attention_heads", "head_dim")}
        return cls(**cls.from_hf_sizes(config), **own, rope=RopeConfig.from_hf(config))

    @classmethod
    def for_target(cls, target: Any, draft_vocab_size: int) -> dict[str, Any]:
        own = {name: getattr(target, name) for name in ("num_attention_heads", "head_dim", "rope")}
        return cls.sizes_for_target(target, draft_vocab_size) | own

    def to_hf(self) -> dict[str, Any]:
        return {
            **self.to_hf_sizes(SERVING_ARCHITECTURE, MODEL_TYPES[0]),
            "num_attention_heads": self.num_attention_heads, "num_key_value_heads": 1, "head_dim": self.head_dim,
            "max_position_embeddings": self.rope.max_position_embeddings, **self.rope.to_hf(),
        }  # fmt: skip


def name_table(config: Config):
    """The rows for this config."""
    return (*COMMON_NAMES, *OWN_NAMES, *extra_names(config))


class Tempered(GQA):
    """Grouped queries in one group, whose scores are divided by a temperature of their head."""

    def __init__(self, config: Config, precision: Precision, rngs: nnx.Rngs, sharding: Sharding):
        c = config
        super().__init__(
            GQAConfig(c.num_attention_heads, 1, c.head_dim, c.rope), 2 * c.hidden_size, c.hidden_size, precision, rngs,
            sharding,
        )  # fmt: skip
        self.temperature = nnx.Param(jnp.ones((c.num_attention_heads,), precision.param), place="whole")

    def query(self, projected: Projected, positions_BT: Int[Array, "B T"]) -> Float[Array, "B T N H"]:
        q_BTNH = super().query(projected, positions_BT)
        return (q_BTNH / self.temperature[...][None, None, :, None]).astype(q_BTNH.dtype)


def make(config: Config, vocab, target: EmbeddingAndHead, *, precision, sharding, rngs) -> Eagle3Draft:
    """A draft with fresh weights; see `Eagle3Draft`."""
    heads = Tempered(config, precision, rngs, sharding)
    embedding_VD = None if config.owns_embedding else target.embedding()
    return Eagle3Draft(config, heads, vocab, embedding_VD, precision=precision, sharding=sharding, rngs=rngs)


def _weights(config: Mapping[str, Any]) -> Shapes:
    """PyTorch shapes behind `self_attn.`."""
    heads, hidden, head = config["num_attention_heads"], config["hidden_size"], config["head_dim"]
    return {
        "q_proj.weight": (heads * head, 2 * hidden), "k_proj.weight": (head, 2 * hidden),
        "v_proj.weight": (head, 2 * hidden), "o_proj.weight": (hidden, heads * head), "temperature": (heads,),
    }  # fmt: skip


SERVING = Kind(
    name="tempered", title="tempered multi-query", architecture=SERVING_ARCHITECTURE, model_type=MODEL_TYPES[0],
    claims=lambda config: config.get("model_type") == MODEL_TYPES[0], attention=_weights,
    engines={"hf": Served(ARCHITECTURES, SWITCHES)},
)  # fmt: skip
