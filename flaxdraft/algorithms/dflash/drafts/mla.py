"""Layers with multi-head latent attention (DeepSeek and Kimi family), as SpecForge trains them under
`dflash_config.attention_mode: mla`. No released engine serves such drafts: those published for such targets have
grouped queries, and so has the default draft."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from flaxdraft.algorithms.dflash.draft import BlockDraft
from flaxdraft.algorithms.dflash.foreign_fields import of_algorithm
from flaxdraft.algorithms.dflash.sizes import SERVING_ARCHITECTURE, BlockSizes, common_names, of_attention
from flaxdraft.devices.sharding import Sharding
from flaxdraft.errors import InputError
from flaxdraft.interfaces import EmbeddingAndHead, VocabMap
from flaxdraft.nn.mla import MLA, MLAConfig, checked_rope
from flaxdraft.nn.precision import Precision

ARCHITECTURES = (SERVING_ARCHITECTURE,)
MODEL_TYPES = ()
_OWN = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def claims(config: Mapping[str, Any]) -> bool:
    """Whether a config.json of the architecture name that all drafts share is of DFlash and has this attention."""
    return of_algorithm(config, "dflash") and describes(config)


def describes(config: Mapping[str, Any]) -> bool:
    """Whether a config.json has this attention."""
    return bool(config.get("kv_lora_rank"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BlockSizes):
    """Sizes of a draft; names as in DeepSeek's config.json."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "rope", checked_rope(self, "draft.fields"))

    @classmethod
    def for_target(cls, target: Any, draft_vocab_size: int) -> dict[str, Any]:
        """Defaults next to a target: its width and heads, DeepSeek's proportions between the ranks; the ranks and
        widths of a target that has latent attention itself."""
        ranks = {
            "q_lora_rank": max(target.hidden_size // 3 // 64 * 64, 64),
            "kv_lora_rank": max(target.hidden_size // 4 // 64 * 64, 64),
            "qk_nope_head_dim": target.head_dim, "qk_rope_head_dim": target.head_dim // 2,
            "v_head_dim": target.head_dim,
        }  # fmt: skip
        own = {name: getattr(target, name, None) or usual for name, usual in ranks.items()}
        return cls.sizes_for_target(target, draft_vocab_size) | own

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Config:
        """Reads a draft's config.json; see `BlockSizes.from_hf_sizes`.

        Raises:
            InputError: also where rotary pairs are not interleaved, or projections have biases.
        """
        for name, wanted in (("rope_interleave", True), ("attention_bias", False)):
            if bool(config.get(name, wanted)) != wanted:
                raise InputError(f"draft config: {name} is {config[name]}, expected {str(wanted).lower()}")
        own: dict[str, Any] = {name: config[name] for name in _OWN if name != "q_lora_rank"}
        return cls(**cls.from_hf_sizes(config), **own, q_lora_rank=config.get("q_lora_rank"))

    def to_hf(self) -> dict[str, Any]:
        """config.json fields, without the target's layer ids."""
        out = self.to_hf_sizes("deepseek_v3") | {name: getattr(self, name) for name in _OWN}
        nested = out["dflash_config"] | {"attention_mode": "mla"}
        return out | {"rope_interleave": True, "num_key_value_heads": self.num_attention_heads, "dflash_config": nested}


def name_table(config: Config):
    """(JAX path, PyTorch key, transform) of what is trained."""
    rows, plain = common_names(config), config.q_lora_rank is None
    kernels = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj", *(("q_proj",) if plain else ("q_a_proj", "q_b_proj")))
    scales = ("kv_a_layernorm", *(() if plain else ("q_a_layernorm",)))
    for i in range(config.num_hidden_layers):
        rows += [of_attention(i, name, "kernel") for name in kernels]
        rows += [of_attention(i, name, "scale") for name in scales]
    return tuple(rows)


def attentions(config: Config, precision: Precision, sharding: Sharding, rngs: nnx.Rngs) -> list[MLA]:
    """Of each layer."""
    c = config
    heads = MLAConfig(
        c.num_attention_heads, c.q_lora_rank, c.kv_lora_rank, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim,
        c.rms_norm_eps, c.rope,
    )  # fmt: skip
    return [MLA(heads, c.hidden_size, c.hidden_size, precision, rngs, sharding) for _ in range(c.num_hidden_layers)]


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
