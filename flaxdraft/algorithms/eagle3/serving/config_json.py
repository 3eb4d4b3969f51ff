"""config.json of a serving directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxdraft.algorithms.eagle3.serving import layer_ids
from flaxdraft.algorithms.eagle3.serving.kinds import kind_of
from flaxdraft.algorithms.eagle3.serving.terms import Engine
from flaxdraft.serving import rope_fields
from flaxdraft.serving.sanity import MARK
from flaxdraft.serving.trained_draft import AboutTarget


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
    rope_fields.for_context(config, target.get("max_position_embeddings", 0))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if target.get(name) is not None:
            config[name] = target[name]
    return config
