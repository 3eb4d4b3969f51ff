"""Fields of config.json by which drafters of the family differ, and which no draft here has: such a draft is refused by
name, since without the field's meaning it would propose nonsense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxdraft.errors import InputError

# Name -> the values at which a field changes nothing.
TOP: dict[str, tuple[Any, ...]] = {
    "add_swa_attention_sink_bias": (False,), "is_neox_style": (True,), "rope_is_neox_style": (True,),
    "partial_rotary_factor": (1,), "use_gemma_norm": (False,), "hidden_act": ("silu",), "use_swa": (False,),
    "swa_window_size": (), "input_embedding_scale": (1,), "logit_scale": (1,), "mlp_bias": (False,),
    "quantization_config": (),
}  # fmt: skip
NESTED: dict[str, tuple[Any, ...]] = {
    "projector_type": ("dflash",), "attention_mode": ("gqa", "mha", "mla"), "conv_kernel_size": (), "selector_rank": (),
    "selector_top_k": (), "markov_rank": (), "shift_label": (False,), "lilicorr_rank": (),
}  # fmt: skip


def unknown_fields(config: Mapping[str, Any]) -> list[str]:
    """The fields that no draft here has, with their values."""
    nested = config.get("dflash_config")
    nested = nested if isinstance(nested, Mapping) else {}
    places = (("", config, TOP), ("dflash_config.", nested, TOP), ("dflash_config.", nested, NESTED))
    return [
        f"{place}{name} {fields[name]!r}"
        for place, fields, known in places
        for name, harmless in known.items()
        if fields.get(name) is not None and fields[name] not in harmless
    ]


def refuse_unknown(config: Mapping[str, Any]) -> None:
    """
    Raises:
        InputError: config.json has a field that no draft here has.
    """
    if found := unknown_fields(config):
        raise InputError(f"draft config: {', '.join(found)}: drafts of this kind are not supported; expected it absent")
    if not isinstance(config.get("dflash_config"), Mapping):
        raise InputError("draft config: no dflash_config, expected an object with mask_token_id and target_layer_ids")
