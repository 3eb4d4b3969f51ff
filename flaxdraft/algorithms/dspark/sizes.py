"""What a DSpark draft has besides a DFlash draft's sizes; names as in config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

from flaxdraft.algorithms.dflash.sizes import BlockSizes, narrow_width
from flaxdraft.errors import InputError

# What SGLang and vLLM register, and SpecForge's name.
ARCHITECTURES = ("Qwen3DSparkModel", "DSparkDraftModel")
PROJECTOR = "dspark"
HeadType = Literal["vanilla", "gated", "rnn"]
HEAD_TYPES: tuple[str, ...] = get_args(HeadType)
# They stand at the top level, where engines read them, and in dflash_config, where SpecForge does.
HEAD = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")


def nested(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with a dflash_config. DSpark's own authors write none, and its fields at the top level."""
    if "dflash_config" in config or not config.get("target_layer_ids"):
        return dict(config)
    own = ("target_layer_ids", "mask_token_id", "confidence_head_alpha", *HEAD)
    return {**config, "dflash_config": {name: config[name] for name in own if name in config}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DSparkSizes(BlockSizes):
    """A draft architecture adds those of its attention.

    markov_rank: width of what the correction's matrix over the vocabulary reads.
    markov_head_type: the token before a slot alone ("vanilla"), gated by the draft's state, or with a recurrent state.
    confidence_head_with_markov: whether the confidence reads the token before a slot besides the draft's state.
    """

    markov_rank: int
    markov_head_type: str = HEAD_TYPES[0]
    enable_confidence_head: bool = True
    confidence_head_with_markov: bool = True
    sample_from_anchor: bool = True

    projector: ClassVar[str] = PROJECTOR
    own_fields: ClassVar[tuple[str, ...]] = ("markov_rank",)
    whole_vocabulary: ClassVar[str | None] = "the Markov head corrects the logit of every token"

    def __post_init__(self):
        super().__post_init__()
        if not self.sample_from_anchor:
            raise InputError(
                "draft.fields.sample_from_anchor: found False; the newest token's slot of dspark predicts as well, "
                "leave it out"
            )
        if self.markov_head_type not in HEAD_TYPES:
            raise InputError(
                f"draft.fields.markov_head_type: found {self.markov_head_type!r}, expected one of "
                f"{', '.join(HEAD_TYPES)}"
            )

    @classmethod
    def sizes_for_target(cls, target: Any, draft_vocab_size: int) -> dict[str, Any]:
        own = {
            "markov_rank": narrow_width(target.hidden_size), "markov_head_type": HEAD_TYPES[0],
            "enable_confidence_head": True, "confidence_head_with_markov": True,
        }  # fmt: skip
        return super().sizes_for_target(target, draft_vocab_size) | own

    @classmethod
    def from_hf_sizes(cls, config: dict[str, Any]) -> dict[str, Any]:
        """
        Raises:
            InputError: also where a field of the head stands in two places that differ, or slots are DFlash's.
        """
        config = nested(config)
        sizes, inner = super().from_hf_sizes(config), config["dflash_config"]
        for name in HEAD:
            if name in config and name in inner and config[name] != inner[name]:
                raise InputError(
                    f"draft config: {name} is {config[name]}, in dflash_config {inner[name]}; write the one of "
                    "training in both"
                )
        said = {place["sample_from_anchor"] for place in (config, inner) if "sample_from_anchor" in place}
        if said == {False}:
            raise InputError(
                "draft config: sample_from_anchor is false: slots as DFlash has them, which no DSpark draft here has"
            )
        both = inner | {name: config[name] for name in HEAD if name in config}
        own = {name: both[name] for name in HEAD[:1]}
        if "markov_head_type" in both:
            own["markov_head_type"] = str(both["markov_head_type"]).lower()
        own["enable_confidence_head"] = bool(
            both.get("enable_confidence_head", (both.get("confidence_head_alpha") or 0) > 0)
        )
        own["confidence_head_with_markov"] = bool(both.get("confidence_head_with_markov", False))
        return sizes | own | {"sample_from_anchor": True}

    def to_hf_sizes(self, model_type: str) -> dict[str, Any]:
        out, own = super().to_hf_sizes(model_type), {name: getattr(self, name) for name in HEAD}
        inner = out["dflash_config"] | {"projector_type": PROJECTOR} | own
        del inner["sample_from_anchor"]  # vLLM stops at it there, and reads it at the top level
        if (kv_heads := getattr(self, "num_key_value_heads", None)) is not None:  # SpecForge asks which
            inner["attention_mode"] = "mha" if kv_heads == self.num_attention_heads else "gqa"
        return out | own | {
            "architectures": [*ARCHITECTURES[:1]], "sample_from_anchor": True, "dflash_config": inner,
        }  # fmt: skip
