"""The layer in a config.json of speculators, which holds only what differs from transformers' class of that type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flaxdraft.errors import InputError

FORM = "speculators_model_type"  # the field by which that form is told; it names the algorithm
NESTED = "transformer_layer_config"
_DEFAULTS = {
    "llama": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    },
    "qwen3": {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_attention_heads": 32,
        "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    },
}  # fmt: skip


def check_types(config: Mapping[str, Any], malformed: Callable[[Mapping[str, Any]], list[str]], origin: str) -> None:
    """
    Args:
        malformed: which fields hold what no such field can.

    Raises:
        InputError: config.json has such fields, or the layer nested in it.
    """
    layer = config.get(NESTED)
    if wrong := [*malformed(config), *(malformed(layer) if isinstance(layer, dict) else ())]:
        raise InputError(f"{origin}: config.json: {'; '.join(wrong)}")


def layer_of(config: Mapping[str, Any], kinds: tuple[str, ...], usual: str, origin: str) -> dict[str, Any]:
    """Every field of the layer, nulls left out.

    Args:
        kinds: the types of layers that are understood.
        usual: the type where none is said.

    Raises:
        InputError: there is no layer, or it is of another type; layer_types is no list.
    """
    layer = config.get(NESTED)
    if not isinstance(layer, dict):
        raise InputError(f"{origin}: no {NESTED}, expected the layer's configuration")
    kind = layer.get("model_type", usual)
    if kind not in kinds:
        raise InputError(f"{origin}: {NESTED}.model_type {kind!r}, expected one of {', '.join(kinds)}")
    said = {name: value for name, value in layer.items() if value is not None}
    if not isinstance(types := said.get("layer_types", []), list):
        raise InputError(f"{origin}: {NESTED}.layer_types: found {types!r}, expected a list of names")
    return _DEFAULTS[kind] | said | {"model_type": kind}
