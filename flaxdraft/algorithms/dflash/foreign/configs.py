"""config.json of other trainers, in the form that engines read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from flaxdraft.algorithms.dflash.foreign.family import OF_DFLASH, Family
from flaxdraft.algorithms.dflash.foreign_fields import of_algorithm
from flaxdraft.algorithms.dflash.serving.terms import CONFIG, INPUT_TAPS, TAPS
from flaxdraft.algorithms.importing import algorithm_named
from flaxdraft.errors import InputError
from flaxdraft.serving import rope_fields
from flaxdraft.serving.foreign.layers import FORM, NESTED, layer_of

_LEFT_OUT = ("auto_map", FORM, NESTED, "speculators_config", "transformers_version", "use_cache", "dtype")


class Understood(NamedTuple):
    """A config in the engines' form, and remarks for the report."""

    config: dict[str, Any]
    remarks: list[str]


def claims(config: Mapping[str, Any], family: Family = OF_DFLASH) -> bool:
    """Whether a config.json is of such a draft, whoever wrote it. An architecture that no draft here has says nothing;
    dflash_config then tells."""
    name = family.kind.projector
    if FORM in config:
        return config[FORM] == name and family.fields is not None
    named = algorithm_named(config)
    return named == name if named is not None else CONFIG in config and of_algorithm(config, name)


def understand(config: Mapping[str, Any], origin: str, family: Family = OF_DFLASH) -> Understood:
    """
    Raises:
        InputError: a form or a field that no draft of this project has, or one without which nobody can tell what was
            trained.
    """
    if FORM in config:
        out, remarks = _speculators(config, origin, family)
    else:
        out, remarks = _plain(family.settled(config), origin)
    if not rope_fields.spoken(out):
        remarks.append("no RoPE parameters in config.json: base 10000")
    out = {name: value for name, value in out.items() if value is not None and name not in _LEFT_OUT}
    return Understood(out | {"architectures": [family.architecture], "tie_word_embeddings": False}, remarks)


def _plain(config: Mapping[str, Any], origin: str) -> tuple[dict[str, Any], list[str]]:
    """A config of SpecForge or z-lab: the engines' form, the tapped layers that its trainer derived written out."""
    nested, remarks = dict(config.get(CONFIG) or {}), []
    if config.get("num_hidden_layers") is None:
        raise InputError(f"{origin}: no num_hidden_layers; write how many layers the weights are of")
    if nested.get(TAPS) is None:
        if (num_target := config.get("num_target_layers")) is None:
            raise InputError(f"{origin}: neither {CONFIG}.{TAPS} nor num_target_layers; write the tapped layers there, "
                             "counted by output from 0")  # fmt: skip
        nested[TAPS] = derived_taps(num_target, config["num_hidden_layers"])
        remarks.append(f"no {TAPS}: SpecForge's and z-lab's for {config['num_hidden_layers']} layers next to "
                       f"{num_target}, {nested[TAPS]}")  # fmt: skip
    if nested.get("mask_token_id") is None:
        raise InputError(f"{origin}: no {CONFIG}.mask_token_id; write the token that the draft was trained with")
    out = {**config, **_windows(config, nested)}
    return {**out, CONFIG: {name: value for name, value in nested.items() if value is not None}}, remarks


def _windows(config: Mapping[str, Any], nested: dict[str, Any]) -> dict[str, Any]:
    """What vLLM makes of `use_swa` and `swa_window_size`, which are taken out of the nested object."""
    everywhere, window = nested.pop("use_swa", None), nested.pop("swa_window_size", None)
    kinds = config.get("layer_types") or []
    out = {"sliding_window": window} if window is not None and (everywhere or "sliding_attention" in kinds) else {}
    if everywhere and "sliding_attention" not in kinds:
        out["layer_types"] = ["sliding_attention"] * config["num_hidden_layers"]
        if config.get("is_causal") is None and nested.get("causal") is None:
            out["is_causal"] = False
    return out


def derived_taps(num_target: int, num_layers: int) -> list[int]:
    """The layers that these trainers tap where nobody chose any."""
    if num_layers == 1:
        return [num_target // 2]
    return [round(1 + i * (num_target - 4) / (num_layers - 1)) for i in range(num_layers)]


def _speculators(config: Mapping[str, Any], origin: str, family: Family) -> tuple[dict[str, Any], list[str]]:
    kind = family.kind
    for name in ("aux_hidden_state_layer_ids", "mask_token_id"):
        if config.get(name) is None:
            raise InputError(f"{origin}: no {name}; write what the draft was trained with")
    layer, inputs = layer_of(config, ("qwen3", "llama"), "qwen3", origin), config["aux_hidden_state_layer_ids"]
    if 0 in inputs:
        raise InputError(f"{origin}: aux_hidden_state_layer_ids {inputs} taps the embedding (0); no draft here does")
    nested: dict[str, Any] = {TAPS: [layer_id - 1 for layer_id in inputs], "mask_token_id": config["mask_token_id"]}
    remarks = [f"aux_hidden_state_layer_ids {inputs} count inputs of layers: the outputs of {nested[TAPS]}"]
    own = {
        "model_type": "qwen3", "block_size": config.get("block_size", 8), "hidden_act": "silu",
        "draft_vocab_size": config.get("draft_vocab_size", 32000),
    }  # fmt: skip
    for name, default in (family.fields or {}).items():
        nested[name] = default if config.get(name) is None else config[name]
    if kind.from_anchor and "sample_from_anchor" not in config:
        raise InputError(f"{origin}: no sample_from_anchor, which the trainer reads as true and vLLM as false: it says "
                         "which token a slot predicts; write what the draft was trained with")  # fmt: skip
    if bool(config.get("sample_from_anchor")) != kind.from_anchor:
        nested["sample_from_anchor"] = not kind.from_anchor
    if "sliding_attention" in (layer.get("layer_types") or ()):
        remarks.append("sliding layers: that trainer counts the window from the anchor, engines and flaxdraft from "
                       "each slot, which then sees up to block_size fewer tokens")  # fmt: skip
        if config.get("sliding_window_non_causal", family.bidirectional):
            own["is_causal"] = False
    layer = {name: value for name, value in layer.items() if name not in INPUT_TAPS}
    target_hidden = config.get("target_hidden_size")
    return dict(family.settled(layer | own | {"target_hidden_size": target_hidden, CONFIG: nested})), remarks
