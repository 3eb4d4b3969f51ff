"""Qwen3-like layers: grouped-query attention with a norm over each query and key head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from flaxdraft.algorithms.dflash.draft import BlockDraft
from flaxdraft.algorithms.dflash.foreign_fields import of_algorithm
from flaxdraft.algorithms.dflash.sizes import SERVING_ARCHITECTURE, BlockSizes, common_names, of_attention
from flaxdraft.devices.sharding import Sharding
from flaxdraft.interfaces import EmbeddingAndHead, VocabMap
from flaxdraft.nn.gqa import GQA, GQAConfig, check_grouped
from flaxdraft.nn.precision import Precision
from flaxdraft.nn.rope import RopeConfig

ARCHITECTURES = (SERVING_ARCHITECTURE,)
MODEL_TYPES = ()  # configs of other drafters say model_type qwen3 as well
_OWN = ("num_key_value_heads", "head_dim", "attention_bias")


def claims(config: Mapping[str, Any]) -> bool:
    """Whether a config.json of the architecture name that all drafts share is of DFlash and has this attention."""
    return of_algorithm(config, "dflash") and describes(config)


def describes(config: Mapping[str, Any]) -> bool:
    """Whether a config.json has this attention."""
    return not config.get("kv_lora_rank")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BlockSizes):
    """Sizes of a draft; attention_bias: of q, k, v and the way out."""

    num_key_value_heads: int
    head_dim: int
    attention_bias: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_grouped(self, "draft.fields")

    @classmethod
    def for_target(cls, target: Any, draft_vocab_size: int) -> dict[str, Any]:
        """Defaults next to a target: its widths, heads and rotary embedding. Next to latent attention heads of its
        value width that fill the hidden size, as published drafts for such targets have them."""
        sizes, kv_heads, width = (
            cls.sizes_for_target(target, draft_vocab_size), target.num_key_value_heads, target.head_dim
        )  # fmt: skip
        if hasattr(target, "kv_lora_rank"):
            width = target.v_head_dim
            heads, rope = max(target.hidden_size // width, 1), target.rope
            kv_heads = next(count for count in range(8, 0, -1) if heads % count == 0)
            rope = RopeConfig(rope_theta=rope.rope_theta, max_position_embeddings=rope.max_position_embeddings)
            sizes |= {"num_attention_heads": heads, "rope": rope}
        return sizes | {"num_key_value_heads": kv_heads, "head_dim": width, "attention_bias": False}

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Config:
        """Reads a draft's config.json; see `BlockSizes.from_hf_sizes`."""
        heads = config["num_attention_heads"]
        return cls(
            **cls.from_hf_sizes(config), num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            attention_bias=bool(config.get("attention_bias")),
        )  # fmt: skip

    def to_hf(self) -> dict[str, Any]:
        """config.json fields, without the target's layer ids."""
        return self.to_hf_sizes("qwen3") | {name: getattr(self, name) for name in _OWN}


def name_table(config: Config):
    """(JAX path, PyTorch key, transform) of what is trained."""
    rows = common_names(config)
    for i in range(config.num_hidden_layers):
        kinds = ("kernel", "bias") if config.attention_bias else ("kernel",)
        rows += [of_attention(i, f"{name}_proj", kind) for name in "qkvo" for kind in kinds]
        rows += [of_attention(i, name, "scale") for name in ("q_norm", "k_norm")]
    return tuple(rows)


def attentions(config: Config, precision: Precision, sharding: Sharding, rngs: nnx.Rngs) -> list[GQA]:
    """Of each layer."""
    c = config
    heads = GQAConfig(
        c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rope, c.attention_bias, c.attention_bias,
        c.rms_norm_eps,
    )  # fmt: skip
    return [GQA(heads, c.hidden_size, c.hidden_size, precision, rngs, sharding) for _ in range(c.num_hidden_layers)]


def make(
    config: Config, vocab: VocabMap, target: EmbeddingAndHead, *, precision: Precision, sharding: Sharding,
    rngs: nnx.Rngs, draft: type[BlockDraft] = BlockDraft,
) -> BlockDraft:  # fmt: skip
    """A draft with fresh weights; see `BlockDraft`.

    Args:
        draft: the class of an algorithm that builds on this one.
    """
    of_layers = attentions(config, precision, sharding, rngs)
    return draft(config, of_layers, vocab, target, precision=precision, sharding=sharding, rngs=rngs)
