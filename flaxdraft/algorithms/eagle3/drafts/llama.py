"""The Llama draft: grouped-query attention on the EAGLE-3 surface."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx

from flaxdraft.algorithms.eagle3.draft import COMMON_NAMES, Eagle3Draft, Eagle3Sizes, extra_names
from flaxdraft.algorithms.eagle3.serving.terms import Kind, Shapes
from flaxdraft.devices.sharding import Sharding
from flaxdraft.errors import InputError
from flaxdraft.interfaces import EmbeddingAndHead
from flaxdraft.nn.gqa import GQA, GQAConfig, check_grouped
from flaxdraft.nn.precision import Precision
from flaxdraft.nn.rope import RopeConfig
from flaxdraft.serving.finding import Finding

ARCHITECTURES = (
    "LlamaForCausalLMEagle3",
    "Eagle3LlamaForCausalLM",
    "LlamaEagle3DraftModel",
    # vLLM serves these families' drafts with its Llama one.
    "Eagle3MiniMaxM2ForCausalLM",
    "Eagle3Qwen2_5vlForCausalLM",
    "Eagle3Qwen3vlForCausalLM",
)
MODEL_TYPES = ("llama",)
SERVING_ARCHITECTURE = "LlamaForCausalLMEagle3"  # SGLang, vLLM and sglang-jax all take this one

NAME_TABLE = (
    *COMMON_NAMES,
    ("self_attn/q_proj/kernel", "midlayer.self_attn.q_proj.weight", "transpose"),
    ("self_attn/k_proj/kernel", "midlayer.self_attn.k_proj.weight", "transpose"),
    ("self_attn/v_proj/kernel", "midlayer.self_attn.v_proj.weight", "transpose"),
    ("self_attn/o_proj/kernel", "midlayer.self_attn.o_proj.weight", "transpose"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Eagle3Sizes):
    """Sizes of a Llama draft."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: RopeConfig

    def __post_init__(self):
        super().__post_init__()
        check_grouped(self, "draft.fields")

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Config:
        """Reads a draft's config.json."""
        if config.get("attention_bias"):
            raise InputError("draft config: attention_bias is true; servers load no attention biases, expected false")
        heads = config["num_attention_heads"]
        return cls(
            **cls.from_hf_sizes(config),
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rope=RopeConfig.from_hf(config),
        )

    @classmethod
    def for_target(cls, target: Any, draft_vocab_size: int) -> dict[str, Any]:
        """Defaults next to a target: its widths, heads and rotary embedding. Next to latent attention, whose heads
        are too many and too wide for grouped queries, heads of its value width that fill the hidden size."""
        sizes = cls.sizes_for_target(target, draft_vocab_size)
        heads, kv_heads, width, rope = (
            target.num_attention_heads, target.num_key_value_heads, target.head_dim, target.rope.for_draft()
        )  # fmt: skip
        if hasattr(target, "kv_lora_rank"):
            width = target.v_head_dim
            heads = max(target.hidden_size // width, 1)
            kv_heads = next(count for count in range(8, 0, -1) if heads % count == 0)
            rope = RopeConfig(rope_theta=rope.rope_theta, max_position_embeddings=rope.max_position_embeddings)
        return sizes | {
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": width, "rope": rope,
        }  # fmt: skip

    def to_hf(self) -> dict[str, Any]:
        """config.json fields, without the target's layer ids."""
        return {
            **self.to_hf_sizes(SERVING_ARCHITECTURE, "llama"),
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.rope.max_position_embeddings,
            **self.rope.to_hf(),
        }


def name_table(config: Config):
    """The rows for this config."""
    return (*NAME_TABLE, *extra_names(config))


def attention(config: Config, precision: Precision, rngs: nnx.Rngs, sharding: Sharding) -> GQA:
    c = config
    gqa = GQAConfig(c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rope)
    return GQA(gqa, 2 * c.hidden_size, c.hidden_size, precision, rngs, sharding)


def make(config: Config, vocab, target: EmbeddingAndHead, *, precision, sharding, rngs) -> Eagle3Draft:
    """A draft with fresh weights; see `Eagle3Draft`."""
    heads = attention(config, precision, rngs, sharding)
    embedding_VD = None if config.owns_embedding else target.embedding()
    return Eagle3Draft(config, heads, vocab, embedding_VD, precision=precision, sharding=sharding, rngs=rngs)


def _weights(config: Mapping[str, Any]) -> Shapes:
    """As engines load them; written down apart from NAME_TABLE, with which tests compare it."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    width = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    return {
        "q_proj.weight": (heads * width, 2 * hidden),
        "k_proj.weight": (kv_heads * width, 2 * hidden),
        "v_proj.weight": (kv_heads * width, 2 * hidden),
        "o_proj.weight": (hidden, heads * width),
    }


def _yarn(rope: Mapping[str, Any]) -> Iterator[Finding]:
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if all_dim and mscale != all_dim and mscale:
        yield Finding("wrong", f"it ignores mscale {mscale} and mscale_all_dim {all_dim} of a Llama draft",
                      "train with rope parameters that have neither")  # fmt: skip


SERVING = Kind(
    name="llama", title="Llama", architecture=SERVING_ARCHITECTURE, model_type="llama", attention=_weights, yarn=_yarn
)
