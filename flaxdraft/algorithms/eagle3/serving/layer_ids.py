"""Tapped layers in config.json: who reads them where, and what they count.

`eagle_config.eagle_aux_hidden_state_layer_ids` is SGLang's place and counts layer OUTPUTS, except next to a target of
the DeepSeek family: there ids whose first is 1 count outputs, all others count INPUTS (srt/models/deepseek_v2.py).
The top-level `eagle_aux_hidden_state_layer_ids` is vLLM's place and counts inputs: the input of layer i is the output
of layer i - 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flaxdraft.plugins import architectures_of

DEEPSEEK = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25")
NAME = "eagle_aux_hidden_state_layer_ids"


def is_deepseek(target: Mapping[str, Any]) -> bool:
    """Whether SGLang runs this target (its config.json) with the model that counts inputs."""
    return target.get("model_type") in DEEPSEEK or any("Deepseek" in name for name in architectures_of(target))


def default_outputs(num_layers: int) -> list[int]:
    """The layers that every engine taps unless it is told otherwise."""
    return [1, num_layers // 2 - 1, num_layers - 4]


def fields(outputs: Sequence[int], deepseek: bool) -> dict[str, Any]:
    """Both places, for layers by output."""
    inputs = [layer + 1 for layer in outputs]
    counted = inputs if deepseek and outputs[0] != 1 else list(outputs)
    return {
        "eagle_config": {"use_aux_hidden_state": True, NAME: counted},
        NAME: inputs,
        "num_aux_hidden_states": len(inputs),
    }


def sglang_outputs(ids: Sequence[int], deepseek: bool) -> list[int]:
    """The outputs that SGLang captures for the ids in its place."""
    return [layer - 1 for layer in ids] if deepseek and ids[0] != 1 else list(ids)


def nested_ids(config: Mapping[str, Any]) -> list[int] | None:
    """What stands in eagle_config."""
    nested = config.get("eagle_config")
    return nested.get(NAME) if isinstance(nested, dict) else None


def outputs_of(config: Mapping[str, Any], deepseek: bool = False) -> list[int] | None:
    """The tapped layers by output: from the top level, which counts the same way for every target, else from
    eagle_config; None where neither names any."""
    if config.get(NAME) is not None:
        return [layer - 1 for layer in config[NAME]]
    ids = nested_ids(config)
    return None if ids is None else sglang_outputs(ids, deepseek)
