"""Fields of config.json by which drafters of the family differ, and which no draft here has: such a draft is refused by
name, since without the field's meaning it would propose nonsense."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from flaxdraft.errors import InputError
from flaxdraft.plugins import parts_of

# Name -> the values at which a field changes nothing.
TOP: dict[str, tuple[Any, ...]] = {
    "add_swa_attention_sink_bias": (False,), "is_neox_style": (True,), "rope_is_neox_style": (True,),
    "partial_rotary_factor": (1,), "use_gemma_norm": (False,), "hidden_act": ("silu",), "use_swa": (False,),
    "swa_window_size": (), "input_embedding_scale": (1,), "logit_scale": (1,), "mlp_bias": (False,),
    "quantization_config": (),
}  # fmt: skip
NESTED: dict[str, tuple[Any, ...]] = {
    "attention_mode": ("gqa", "mha", "mla"), "conv_kernel_size": (), "selector_rank": (),
    "selector_top_k": (), "markov_rank": (), "shift_label": (False,), "lilicorr_rank": (),
}  # fmt: skip


def of_algorithm(config: Mapping[str, Any], name: str) -> bool:
    """Whether a config.json is of one algorithm. The family's drafters share an architecture name, so `projector_type`
    says which it is; without it, or where no algorithm has that name, it is dflash, which refuses what it does not
    know."""
    nested = config.get("dflash_config")
    named = nested.get("projector_type") if isinstance(nested, Mapping) else None
    others = {other for other, _ in parts_of("flaxdraft.algorithms")} - {"dflash"}
    return named == name or (name == "dflash" and not (isinstance(named, str) and named in others))


def unknown_fields(config: Mapping[str, Any], projector: str = "dflash", own: Collection[str] = ()) -> list[str]:
    """The fields that no draft of an algorithm has, with their values.

    Args:
        projector: how `projector_type` names the algorithm.
        own: fields of NESTED whose meaning it knows.
    """
    nested = config.get("dflash_config")
    nested = nested if isinstance(nested, Mapping) else {}
    strange = {name: harmless for name, harmless in NESTED.items() if name not in own} | {
        "projector_type": (projector,)
    }
    places = (("", config, TOP), ("dflash_config.", nested, TOP), ("dflash_config.", nested, strange))
    return [
        f"{place}{name} {fields[name]!r}"
        for place, fields, known in places
        for name, harmless in known.items()
        if fields.get(name) is not None and fields[name] not in harmless
    ]


def refuse_unknown(config: Mapping[str, Any], projector: str = "dflash", own: Collection[str] = ()) -> None:
    """
    Raises:
        InputError: config.json has a field that no draft of the algorithm has.
    """
    if found := unknown_fields(config, projector, own):
        raise InputError(f"draft config: {', '.join(found)}: drafts of this kind are not supported; expected it absent")
    if not isinstance(config.get("dflash_config"), Mapping):
        raise InputError("draft config: no dflash_config, expected an object with mask_token_id and target_layer_ids")
