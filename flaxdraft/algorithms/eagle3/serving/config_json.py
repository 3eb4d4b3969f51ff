"""config.json of a serving directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxdraft.algorithms.eagle3.serving import layer_ids
from flaxdraft.algorithms.eagle3.serving.kinds import kind_of
from flaxdraft.algorithms.eagle3.serving.terms import Engine
from flaxdraft.serving.sanity import MARK
from flaxdraft.serving.trained_draft import AboutTarget

# Their angles do not depend on the context's length, so that the target's own can be written.
_FREE_OF_LENGTH = ("default", "linear", "llama3", "yarn")


def config_json(draft: Mapping[str, Any], about: AboutTarget, dtype: str, engine: Engine) -> dict[str, Any]:
    """The draft's own fields with what serving asks for besides.

    Args:
        draft: `Config.to_hf()` of the draft.
    """
    target = about.config
    config = {
        **draft,
        "torch_dtype": dtype,
        **layer_ids.fields(about.tap_layers, layer_ids.is_deepseek(target)),
        MARK: "flaxdraft",
    }
    served = engine.kinds.get(kind_of(config).name)
    if served is not None:  # else the rules refuse the draft in their own words
        config["architectures"] = [served.architectures[0]]
    _complete_yarn(config)
    if config["rope_parameters"]["rope_type"] in _FREE_OF_LENGTH:
        context = target.get("max_position_embeddings", 0)
        config["max_position_embeddings"] = max(config["max_position_embeddings"], context)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if target.get(name) is not None:
            config[name] = target[name]
    return config


def _complete_yarn(config: dict[str, Any]) -> None:
    """Absent parameters of YaRN written out in both dialects, in place, since readers differ in their defaults; these
    are the formula's own."""
    if config["rope_parameters"]["rope_type"] != "yarn":
        return
    usual = {
        "original_max_position_embeddings": config["max_position_embeddings"],
        "mscale": 1.0,
        "mscale_all_dim": 0.0,
    }
    for dialect in ("rope_parameters", "rope_scaling"):
        config[dialect] = usual | config[dialect]
