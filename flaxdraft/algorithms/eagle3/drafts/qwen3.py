"""The Qwen3 draft: the Llama draft's grouped-query attention, with one RMSNorm over each query and one over each key
head before rotation. speculators trains it by default, and vLLM serves it with a class of its own
(model_executor/models/qwen3_eagle3.py); other engines have none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from flaxdraft.algorithms.eagle3.draft import Eagle3Draft
from flaxdraft.algorithms.eagle3.drafts import llama
from flaxdraft.algorithms.eagle3.serving.terms import SWITCHES, Kind, Served, Shapes
from flaxdraft.devices.sharding import Sharding
from flaxdraft.interfaces import EmbeddingAndHead
from flaxdraft.nn.gqa import GQA, GQAConfig
from flaxdraft.nn.precision import Precision
from flaxdraft.plugins import architectures_of

SERVING_ARCHITECTURE = "Eagle3Qwen3ForCausalLM"
ARCHITECTURES = (SERVING_ARCHITECTURE,)
MODEL_TYPES = ()  # every draft for a Qwen3 target may say qwen3, whatever its layer is
HEAD_DIM = 128  # of transformers' Qwen3Config, where a config.json names none

QK_NORM_NAMES = tuple(
    (f"self_attn/{p}_norm/scale", f"midlayer.self_attn.{p}_norm.weight", "copy") for p in ("q", "k")
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    """Sizes of a Qwen3 draft."""

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Config:
        """Reads a draft's config.json."""
        found = super().from_hf({**config, "head_dim": config.get("head_dim") or HEAD_DIM})
        assert isinstance(found, cls), "made by its own class"
        return found

    def to_hf(self) -> dict[str, Any]:
        """config.json fields, without the target's layer ids."""
        return super().to_hf() | {"architectures": [SERVING_ARCHITECTURE], "model_type": "qwen3"}


def name_table(config: Config):
    """The rows for this config."""
    return (*llama.name_table(config), *QK_NORM_NAMES)


def attention(config: Config, precision: Precision, rngs: nnx.Rngs, sharding: Sharding) -> GQA:
    c = config
    gqa = GQAConfig(c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rope, qk_norm_eps=c.rms_norm_eps)
    return GQA(gqa, 2 * c.hidden_size, c.hidden_size, precision, rngs, sharding)


def make(config: Config, vocab, target: EmbeddingAndHead, *, precision, sharding, rngs) -> Eagle3Draft:
    """A draft with fresh weights; see `Eagle3Draft`."""
    heads = attention(config, precision, rngs, sharding)
    embedding_VD = None if config.owns_embedding else target.embedding()
    return Eagle3Draft(config, heads, vocab, embedding_VD, precision=precision, sharding=sharding, rngs=rngs)


def _weights(config: Mapping[str, Any]) -> Shapes:
    """As vLLM loads them."""
    width = config.get("head_dim") or HEAD_DIM
    shapes = llama.SERVING.attention({**config, "head_dim": width})
    return shapes | {"q_norm.weight": (width,), "k_norm.weight": (width,)}


SERVING = Kind(
    name="qwen3", title="Qwen3", architecture=SERVING_ARCHITECTURE, model_type="qwen3",
    claims=lambda config: SERVING_ARCHITECTURE in architectures_of(config),
    attention=_weights, yarn=llama.SERVING.yarn,
    engines={
        "vllm": Served(ARCHITECTURES, ("fc_norm", "norm_output", "norm_before_fc", "norm_before_residual")),
        "hf": Served(ARCHITECTURES, SWITCHES),
    },
)  # fmt: skip
