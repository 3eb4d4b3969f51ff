"""Sizes and switches that every draft has, whatever its attention; names as in config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, get_type_hints

from flaxdraft.algorithms.dflash.block_attention import Sight
from flaxdraft.algorithms.dflash.foreign_fields import refuse_unknown
from flaxdraft.algorithms.dflash.taps import default_taps
from flaxdraft.errors import InputError
from flaxdraft.nn.rope import RopeConfig
from flaxdraft.serving.fields import FLAG, SIZE, Expected, Positive, Size

SERVING_ARCHITECTURE = "DFlashDraftModel"  # SGLang and vLLM; other trainers, whatever the attention
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
    "hidden_size", "intermediate_size", "vocab_size", "rms_norm_eps", "num_attention_heads", "num_hidden_layers",
    "block_size",
)  # fmt: skip
# In dflash_config, where engines read them; left out where they change nothing.
SWITCHES = {
    "attention_sink_bias": False, "attention_value_scale": 1.0, "output_multiplier": 1.0,
    "final_logit_softcapping": None,
}  # fmt: skip


def narrow_width(hidden_size: int) -> int:
    """Of a matrix over the vocabulary beside the target's head: a sixteenth of the target's width, as in drafts of
    Qwen3-8B (256 to 4096), a multiple of 16, and at least 32."""
    return max(hidden_size // 16 // 16 * 16, 32)


def switch(config: Mapping[str, Any], name: str) -> Any:
    """The value of a switch as trainers read it: from dflash_config, else from the top level, where no engine looks."""
    places = config["dflash_config"], config
    return next((place[name] for place in places if place.get(name) is not None), SWITCHES[name])


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """The sizes of a draft but for its attention, which a draft architecture adds.

    layer_types: one of LAYER_TYPES for each layer; empty: full attention everywhere.
    is_causal: in the block, of all layers; None: of sliding layers alone, as engines have it.
    attention_sink_bias: every head has a sink in its softmax, a trained score without a value.
    final_logit_softcapping: the cap of the logits, after `output_multiplier`; None: none.
    """

    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    vocab_size: int
    draft_vocab_size: int
    rms_norm_eps: float
    num_attention_heads: int
    num_hidden_layers: int
    num_taps: int
    block_size: int
    mask_token_id: int
    rope: RopeConfig
    sample_from_anchor: bool = False
    is_causal: bool | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    attention_sink_bias: bool = False
    attention_value_scale: float = 1.0
    output_multiplier: float = 1.0
    final_logit_softcapping: float | None = None

    # What drafts of an algorithm that builds on this one have otherwise.
    projector: ClassVar[str] = "dflash"  # how dflash_config.projector_type names it
    own_fields: ClassVar[tuple[str, ...]] = ()  # of `foreign_fields.NESTED`, those whose meaning it knows
    may_be_zero: ClassVar[tuple[str, ...]] = ("mask_token_id",)
    whole_vocabulary: ClassVar[str | None] = None  # why drafts know every token of the target; None: they need not

    def __post_init__(self):
        for name, kind in get_type_hints(type(self)).items():
            value, expected = getattr(self, name), _EXPECTED.get(kind)
            if name not in self.may_be_zero and expected is not None and not expected.fits(value):
                raise InputError(f"draft.fields.{name}: found {value!r}, expected {expected.phrase}")
        if self.block_size < 2:
            raise InputError(
                f"draft.fields.block_size: found {self.block_size}, expected at least 2: the newest token and a mask "
                "token behind it"
            )
        self._check_target()
        self._check_layers()

    @property
    def knows_every_token(self) -> bool:
        """Whether the target's head serves the draft; else it brings the rows of the tokens that it knows."""
        return self.draft_vocab_size == self.vocab_size

    def _check_target(self) -> None:
        if self.hidden_size != self.target_hidden_size:
            raise InputError(
                f"draft.fields.hidden_size: found {self.hidden_size}, expected the target's {self.target_hidden_size}: "
                "its embedding and head are the draft's"
            )
        if self.draft_vocab_size > self.vocab_size:
            raise InputError(
                f"draft.fields.draft_vocab_size: found {self.draft_vocab_size}, expected at most the target's "
                f"{self.vocab_size} tokens"
            )
        if self.whole_vocabulary is not None and not self.knows_every_token:
            raise InputError(
                f"draft.fields.draft_vocab_size: found {self.draft_vocab_size}, expected the target's "
                f"{self.vocab_size}: {self.whole_vocabulary}"
            )
        if type(self.mask_token_id) is not int or not 0 <= self.mask_token_id < self.vocab_size:
            raise InputError(
                f"draft.fields.mask_token_id: found {self.mask_token_id!r}, expected a token of the target, "
                f"0..{self.vocab_size - 1}; best one that no text holds"
            )

    def _check_layers(self) -> None:
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
    def sizes_for_target(cls, target: Any, draft_vocab_size: int) -> dict[str, Any]:
        """The common fields of a draft next to a target, before overrides. The mask token is the last row of the
        embedding, which in padded vocabularies no text holds."""
        return {
            "hidden_size": target.hidden_size, "target_hidden_size": target.hidden_size,
            "intermediate_size": target.intermediate_size, "vocab_size": target.vocab_size,
            "draft_vocab_size": draft_vocab_size, "rms_norm_eps": target.rms_norm_eps,
            "num_attention_heads": target.num_attention_heads, "num_hidden_layers": 2,
            "num_taps": len(target.tap_layers or default_taps(target.num_hidden_layers)),
            "mask_token_id": target.vocab_size - 1, "is_causal": None, "sliding_window": None, "layer_types": (),
            "rope": target.rope.for_draft(), **SWITCHES,
        }  # fmt: skip

    @classmethod
    def from_hf_sizes(cls, config: dict[str, Any]) -> dict[str, Any]:
        """The common sizes of a config.json, as keyword arguments.

        Raises:
            InputError: it has something that no draft of this project has.
        """
        refuse_unknown(config, cls.projector, cls.own_fields)
        nested, kinds = config["dflash_config"], tuple(config.get("layer_types") or ())
        if config.get("use_sliding_window") and not kinds:
            raise InputError(
                "draft config: use_sliding_window is true without layer_types, which say what layers slide; give both"
            )
        if set(kinds) <= {LAYER_TYPES[0]}:
            kinds = ()
        shifts = {bool(place.get("sample_from_anchor")) for place in (config, nested) if "sample_from_anchor" in place}
        if len(shifts) > 1:
            raise InputError(
                "draft config: sample_from_anchor differs from the one in dflash_config, and shifts all slots by one; "
                "write the one of training in both"
            )
        return {
            **{name: config[name] for name in _PLAIN if name != "block_size"},
            "block_size": config.get("block_size") or nested["block_size"],
            "target_hidden_size": config.get("target_hidden_size") or config["hidden_size"],
            "draft_vocab_size": config.get("draft_vocab_size") or config["vocab_size"],
            "num_taps": nested.get("num_taps") or len(nested["target_layer_ids"]),
            "mask_token_id": nested["mask_token_id"], "sample_from_anchor": True in shifts,
            "is_causal": nested.get("causal") if config.get("is_causal") is None else config["is_causal"],
            "layer_types": kinds,
            "sliding_window": config.get("sliding_window") if kinds else None, "rope": RopeConfig.from_hf(config),
            **{name: switch(config, name) for name in SWITCHES},
        }  # fmt: skip

    def to_hf_sizes(self, model_type: str) -> dict[str, Any]:
        """The common fields of config.json, without the target's layer ids."""
        nested = {"mask_token_id": self.mask_token_id, "num_taps": self.num_taps}
        nested |= {name: getattr(self, name) for name, usual in SWITCHES.items() if getattr(self, name) != usual}
        if self.sample_from_anchor:
            nested["sample_from_anchor"] = True
        out = {
            "architectures": [SERVING_ARCHITECTURE], "model_type": model_type, "hidden_act": "silu",
            "tie_word_embeddings": False, **{name: getattr(self, name) for name in _PLAIN},
            "layer_types": [*(self.layer_types or (LAYER_TYPES[0],) * self.num_hidden_layers)],
            "max_position_embeddings": self.rope.max_position_embeddings, **self.rope.to_hf(), "dflash_config": nested,
        }  # fmt: skip
        if self.sliding_window is not None:
            out |= {"sliding_window": self.sliding_window, "use_sliding_window": True}
        if not self.knows_every_token:
            out["draft_vocab_size"] = self.draft_vocab_size
        return out if self.is_causal is None else out | {"is_causal": self.is_causal}


def common_names(config: BlockSizes) -> list[tuple[str, str, str]]:
    """(JAX path, PyTorch key, transform) of what every draft is saved with, but for its attention."""
    rows = [("fc/kernel", "fc.weight", "transpose"), ("hidden_norm/scale", "hidden_norm.weight", "copy")]
    if not config.knows_every_token:
        rows.append(("lm_head", "lm_head.weight", "copy"))
    for i in range(config.num_hidden_layers):
        if config.attention_sink_bias:
            rows.append((f"layer_{i}/sink", f"layers.{i}.self_attn.attention_sink_bias", "copy"))
        for name in ("input_layernorm", "post_attention_layernorm"):
            rows.append((f"layer_{i}/{name}/scale", f"layers.{i}.{name}.weight", "copy"))
        for name in ("gate", "up", "down"):
            rows.append((f"layer_{i}/mlp/{name}_proj/kernel", f"layers.{i}.mlp.{name}_proj.weight", "transpose"))
    return [*rows, ("norm/scale", "norm.weight", "copy")]


def of_attention(i: int, name: str, kind: str) -> tuple[str, str, str]:
    """The row of one weight of a layer's attention; kind is kernel, bias or scale."""
    theirs = f"layers.{i}.self_attn.{name}.{'bias' if kind == 'bias' else 'weight'}"
    return f"layer_{i}/self_attn/{name}/{kind}", theirs, "transpose" if kind == "kernel" else "copy"
