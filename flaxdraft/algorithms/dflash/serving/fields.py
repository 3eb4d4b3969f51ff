"""Types of config.json's fields, so that what reads them later can take them as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from flaxdraft.algorithms.dflash.serving import tensors
from flaxdraft.algorithms.dflash.serving.kind import Id, Ids, Kind
from flaxdraft.algorithms.dflash.serving.terms import CONFIG, INPUT_TAPS, TAPS
from flaxdraft.serving import fields
from flaxdraft.serving.fields import FLAG, NAMES, POSITIVE, ROPE, SIZE, TEXT, Expected

_ID, _IDS = Expected("a token id", Id), Expected("a list of layer ids", Ids)
_BLOCK = Expected("an integer of at least 2", Annotated[int, Field(gt=1, lt=2**31)])
_EITHER = {
    "block_size": _BLOCK, "attention_value_scale": POSITIVE, "output_multiplier": POSITIVE,
    "final_logit_softcapping": POSITIVE, "attention_sink_bias": FLAG, "sample_from_anchor": FLAG, "is_causal": FLAG,
    **dict.fromkeys(INPUT_TAPS, _IDS),
}  # fmt: skip
_NESTED = _EITHER | {"mask_token_id": _ID, TAPS: _IDS, "causal": FLAG, "use_swa": FLAG, "swa_window_size": SIZE}
_SIZES = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_hidden_layers")
_LATENT = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_TOP = _EITHER | {
    **dict.fromkeys(
        (*_SIZES, *_LATENT, "draft_vocab_size", "target_hidden_size", "head_dim", "num_key_value_heads",
         "max_position_embeddings", "num_target_layers", "sliding_window", "q_lora_rank", "kv_lora_rank"), SIZE,
    ),
    **dict.fromkeys(("rope_theta", "rms_norm_eps"), POSITIVE),
    **dict.fromkeys(("model_type", "torch_dtype", "dtype", "speculators_model_type"), TEXT),
    **dict.fromkeys(
        ("tie_word_embeddings", "attention_bias", "use_sliding_window", "sliding_window_non_causal"), FLAG
    ),
    **dict.fromkeys(("architectures", "layer_types"), NAMES),
    "mask_token_id": _ID, "rope_parameters": ROPE, "rope_scaling": ROPE,
}  # fmt: skip


def malformed(config: Mapping[str, Any]) -> list[str]:
    """Fields that hold what no such field can; absent and null ones are somebody else's question."""
    nested, found = config.get(CONFIG), fields.malformed(config, _TOP)
    if nested is not None and not isinstance(nested, Mapping):
        return [*found, f"{CONFIG} is {nested!r}, expected an object with mask_token_id and {TAPS}"]
    return [*found, *(f"{CONFIG}.{one}" for one in fields.malformed(nested or {}, _NESTED))]


def missing(config: Mapping[str, Any], kind: Kind) -> list[str]:
    """Fields without which there is no draft, where they are missing or something else."""
    required = dict.fromkeys((*_SIZES, *(_LATENT if tensors.is_latent(config) else ())), SIZE)
    required |= {"rms_norm_eps": POSITIVE, CONFIG: Expected(f"an object with {kind.required}", kind.section)}
    found = [*fields.wrong(config, required), *fields.malformed(config, kind.top)]
    places = [place for place in (config, config.get(CONFIG)) if isinstance(place, Mapping)]
    either = ("block_size", *kind.either)
    return [*found, *(f"no {name}" for name in either if all(place.get(name) is None for place in places))]
