"""Qwen3-like layers: grouped-query attention with a norm over each query and key head."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

from flax import nnx

from flaxdraft.algorithms.dflash.block_attention import Sight
from flaxdraft.algorithms.dflash.draft import BlockDraft
from flaxdraft.algorithms.dflash.foreign_fields import refuse_unknown
from flaxdraft.algorithms.dflash.taps import default_taps
from flaxdraft.devices.sharding import Sharding
from flaxdraft.errors import InputError
from flaxdraft.interfaces import EmbeddingAndHead, VocabMap
from flaxdraft.nn.gqa import GQA, GQAConfig
from flaxdraft.nn.precision import Precision
from flaxdraft.nn.rope import RopeConfig
from flaxdraft.serving.fields import FLAG, SIZE, Expected, Positive, Size

ARCHITECTURES = ("DFlashDraftModel",)
MODEL_TYPES = ()  # other drafters of the family are of the same model type
SERVING_ARCHITECTURE = "DFlashDraftModel"  # SGLang and vLLM

LAYER_TYPES = ("full_attention", "sliding_attention")
_EXPECTED = {
    bool: FLAG,
    bool | None: Expected("true, false or null", bool | None),
    int: SIZE,
    int | None: Expected("a positive integer or null", Size | None),
    float | None: Expected("a positive number or null", Positive | None),
    float: Expected("a positive number (YAML reads 1e-6 as text; write 1.0e-6)", Positive),
}
# Fields that stand in config.json as they are.
_PLAIN = (
    "hidden_size", "intermediate_size", "vocab_size", "rms_norm_eps", "num_attention_heads", "num_key_value_heads",
    "head_dim", "num_hidden_layers", "block_size", "attention_bias",
)  # fmt: skip
# The same, left out where they change nothing.
_SCALES = {"attention_value_scale": 1.0, "output_multiplier": 1.0, "final_logit_softcapping": None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes; names as in config.json.

    layer_types: one of LAYER_TYPES for each layer; empty: full attention everywhere.
    is_causal: in the block, of all layers; None: of sliding layers alone, as engines have it.
    final_logit_softcapping: the cap of the logits, after `output_multiplier`; None: none.
    """

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
    sample_from_anchor: bool = False
    attention_bias: bool = False
    is_causal: bool | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    attention_value_scale: float = 1.0
    output_multiplier: float = 1.0
    final_logit_softcapping: float | None = None

    def __post_init__(self):
        for name, kind in get_type_hints(type(self)).items():
            value, expected = getattr(self, name), _EXPECTED.get(kind)
            if name != "mask_token_id" and expected is not None and not expected.fits(value):
                raise InputError(f"draft.fields.{name}: found {value!r}, expected {expected.phrase}")
        self._check_target()
        self._check_layers()

    def _check_target(self) -> None:
        for name, wanted in (("hidden_size", "target_hidden_size"), ("draft_vocab_size", "vocab_size")):
            if getattr(self, name) != getattr(self, wanted):
                raise InputError(
                    f"draft.fields.{name}: found {getattr(self, name)}, expected the target's {getattr(self, wanted)}: "
                    "its embedding and head are the draft's"
                )
        if type(self.mask_token_id) is not int or not 0 <= self.mask_token_id < self.vocab_size:
            raise InputError(
                f"draft.fields.mask_token_id: found {self.mask_token_id!r}, expected a token of the target, "
                f"0..{self.vocab_size - 1}; best one that no text holds"
            )

    def _check_layers(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"draft.fields.num_key_value_heads: {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise InputError(f"draft.fields.head_dim: found {self.head_dim}, expected an even width (RoPE turns pairs)")
        kinds = tuple(self.layer_types)
        object.__setattr__(self, "layer_types", kinds)  # YAML and JSON give lists
        if kinds and (len(kinds) != self.num_hidden_layers or set(kinds) - set(LAYER_TYPES)):
            raise InputError(
                f"draft.fields.layer_types: found {[*kinds]}, expected {self.num_hidden_layers} of "
                f"{' and '.join(LAYER_TYPES)}, or none for full attention everywhere"
            )
        if ("sliding_attention" in kinds) != (self.sliding_window is not None):
            raise InputError(
                f"draft.fields.sliding_window: found {self.sliding_window} with layer_types {[*kinds]}; a window goes "
                "with sliding_attention layers, and these need one"
            )

    def sights(self) -> list[Sight]:
        """What each layer's slots see."""
        kinds = self.layer_types or (LAYER_TYPES[0],) * self.num_hidden_layers
        sliding = [kind == "sliding_attention" for kind in kinds]
        return [
            Sight(self.block_size, slides if self.is_causal is None else self.is_causal,
                  self.sliding_window if slides else None)
            for slides in sliding
        ]  # fmt: skip

    @classmethod
    def for_target(cls, target: Any, draft_vocab_size: int) -> dict[str, Any]:
        """Defaults next to a target: its widths, heads and rotary embedding. Next to latent attention heads of its
        value width that fill the hidden size, as published drafts for such targets have them. The mask token is the
        last row of the embedding, which in padded vocabularies no text holds."""
        heads, kv_heads, width, rope = (
            target.num_attention_heads, target.num_key_value_heads, target.head_dim, target.rope
        )  # fmt: skip
        if hasattr(target, "kv_lora_rank"):
            width = target.v_head_dim
            heads = max(target.hidden_size // width, 1)
            kv_heads = next(count for count in range(8, 0, -1) if heads % count == 0)
            rope = RopeConfig(rope_theta=rope.rope_theta, max_position_embeddings=rope.max_position_embeddings)
        return {
            "hidden_size": target.hidden_size, "target_hidden_size": target.hidden_size,
            "intermediate_size": target.intermediate_size, "vocab_size": target.vocab_size,
            "draft_vocab_size": draft_vocab_size, "rms_norm_eps": target.rms_norm_eps, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "head_dim": width, "rope": rope, "num_hidden_layers": 2,
            "num_taps": len(target.tap_layers or default_taps(target.num_hidden_layers)),
            "mask_token_id": target.vocab_size - 1, "attention_bias": False, "is_causal": None,
            "sliding_window": None, "layer_types": (), **_SCALES,
        }  # fmt: skip

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Config:
        """Reads a draft's config.json.

        Raises:
            InputError: it has something that no draft of this project has.
        """
        refuse_unknown(config)
        nested, heads, hidden = config["dflash_config"], config["num_attention_heads"], config["hidden_size"]
        kinds = tuple(config.get("layer_types") or ())
        if set(kinds) <= {LAYER_TYPES[0]}:
            kinds = ()
        derived = {
            "num_key_value_heads": config.get("num_key_value_heads") or heads,
            "head_dim": config.get("head_dim") or hidden // heads,
            "attention_bias": bool(config.get("attention_bias")),
            "block_size": config.get("block_size") or nested["block_size"],
            **{name: usual if config.get(name) is None else config[name] for name, usual in _SCALES.items()},
        }
        return cls(
            **{name: config[name] for name in _PLAIN if name not in derived}, **derived,
            target_hidden_size=config.get("target_hidden_size") or hidden,
            draft_vocab_size=config.get("draft_vocab_size") or config["vocab_size"],
            num_taps=nested.get("num_taps") or len(nested["target_layer_ids"]), mask_token_id=nested["mask_token_id"],
            sample_from_anchor=bool(nested.get("sample_from_anchor")),
            is_causal=config.get("is_causal", nested.get("causal")), layer_types=kinds,
            sliding_window=config.get("sliding_window") if kinds else None, rope=RopeConfig.from_hf(config),
        )  # fmt: skip

    def to_hf(self) -> dict[str, Any]:
        """config.json fields, without the target's layer ids."""
        nested = {"mask_token_id": self.mask_token_id, "num_taps": self.num_taps}
        if self.sample_from_anchor:
            nested["sample_from_anchor"] = True
        out = {
            "architectures": [SERVING_ARCHITECTURE], "model_type": "qwen3", "hidden_act": "silu",
            "tie_word_embeddings": False, **{name: getattr(self, name) for name in _PLAIN},
            "layer_types": [*(self.layer_types or (LAYER_TYPES[0],) * self.num_hidden_layers)],
            "max_position_embeddings": self.rope.max_position_embeddings, **self.rope.to_hf(), "dflash_config": nested,
        }  # fmt: skip
        if self.sliding_window is not None:
            out |= {"sliding_window": self.sliding_window, "use_sliding_window": True}
        out |= {name: getattr(self, name) for name, usual in _SCALES.items() if getattr(self, name) != usual}
        return out if self.is_causal is None else out | {"is_causal": self.is_causal}


def name_table(config: Config):
    """(JAX path, PyTorch key, transform) of what is trained."""
    rows = [("fc/kernel", "fc.weight", "transpose"), ("hidden_norm/scale", "hidden_norm.weight", "copy")]
    for i in range(config.num_hidden_layers):
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn/q_norm", "self_attn/k_norm"):
            rows.append((f"layer_{i}/{name}/scale", f"layers.{i}.{name.replace('/', '.')}.weight", "copy"))
        for part, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
            for name in names:
                ours, theirs = f"layer_{i}/{part}/{name}_proj", f"layers.{i}.{part}.{name}_proj"
                rows.append((f"{ours}/kernel", f"{theirs}.weight", "transpose"))
                if config.attention_bias and part == "self_attn":
                    rows.append((f"{ours}/bias", f"{theirs}.bias", "copy"))
    return (*rows, ("norm/scale", "norm.weight", "copy"))


def make(
    config: Config, vocab: VocabMap, target: EmbeddingAndHead, *, precision: Precision, sharding: Sharding,
    rngs: nnx.Rngs,
) -> BlockDraft:  # fmt: skip
    """A draft with fresh weights; see `BlockDraft`."""
    c = config
    heads = GQAConfig(
        c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rope, c.attention_bias, c.attention_bias,
        c.rms_norm_eps,
    )  # fmt: skip
    attentions = [
        GQA(heads, c.hidden_size, c.hidden_size, precision, rngs, sharding) for _ in range(c.num_hidden_layers)
    ]
    return BlockDraft(c, attentions, vocab, target, precision=precision, sharding=sharding, rngs=rngs)
