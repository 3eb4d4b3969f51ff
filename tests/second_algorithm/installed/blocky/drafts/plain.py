"""Grouped-query attention, RMSNorm, a gated feed-forward."""

from __future__ import annotations

import dataclasses
from typing import Any

from blocky.draft import BlockDraft as make
from flaxdraft.errors import InputError
from flaxdraft.nn.rope import RopeConfig

__all__ = ["ARCHITECTURES", "MODEL_TYPES", "Config", "make", "name_table"]

ARCHITECTURES = ("BlockyDraftModel",)
MODEL_TYPES = ("blocky",)
_PLAIN = (
    "hidden_size", "target_hidden_size", "intermediate_size", "vocab_size", "draft_vocab_size", "rms_norm_eps",
    "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers", "num_taps", "block_size",
    "mask_token_id",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes; names as in config.json."""

    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    vocab_size: int
    draft_vocab_size: int
    rms_norm_eps: float
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_hidden_layers: int
    num_taps: int
    block_size: int
    mask_token_id: int
    rope: RopeConfig

    def __post_init__(self):
        for name in _PLAIN:
            value, least = getattr(self, name), 0 if name == "mask_token_id" else 1
            if name != "rms_norm_eps" and (not isinstance(value, int) or value < least):
                raise InputError(f"draft.fields.{name}: found {value!r}, expected an integer of at least {least}")
        for name, wanted in (("hidden_size", "target_hidden_size"), ("draft_vocab_size", "vocab_size")):
            if getattr(self, name) != getattr(self, wanted):
                raise InputError(
                    f"draft.fields.{name}: found {getattr(self, name)}, expected the target's {getattr(self, wanted)}: "
                    "its embedding and head are the draft's"
                )

    @classmethod
    def for_target(cls, target: Any, draft_vocab_size: int) -> dict[str, Any]:
        """Defaults next to a target."""
        same = {
            name: getattr(target, name)
            for name in ("hidden_size", "intermediate_size", "vocab_size", "rms_norm_eps", "num_attention_heads",
                         "num_key_value_heads", "head_dim", "rope")
        }  # fmt: skip
        return same | {
            "target_hidden_size": target.hidden_size, "draft_vocab_size": draft_vocab_size, "num_hidden_layers": 2,
            "num_taps": 5, "mask_token_id": target.vocab_size - 1,
        }  # fmt: skip

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Config:
        return cls(**{name: config[name] for name in _PLAIN}, rope=RopeConfig.from_hf(config))

    def to_hf(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in _PLAIN}
        return own | {
            "architectures": [ARCHITECTURES[0]], "model_type": MODEL_TYPES[0], "hidden_act": "silu",
            "max_position_embeddings": self.rope.max_position_embeddings, **self.rope.to_hf(),
        }  # fmt: skip


def name_table(config: Config):
    """(JAX path, PyTorch key, transform) of what is trained."""
    rows = [("fc/kernel", "fc.weight", "transpose"), ("context_norm/scale", "context_norm.weight", "copy")]
    for i in range(config.num_hidden_layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            rows.append((f"layer_{i}/{name}/scale", f"layers.{i}.{name}.weight", "copy"))
        for part, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
            rows += [
                (f"layer_{i}/{part}/{name}_proj/kernel", f"layers.{i}.{part}.{name}_proj.weight", "transpose")
                for name in names
            ]
    return (*rows, ("norm/scale", "norm.weight", "copy"))
