"""RoPE in config.json, in the dialect that a reader knows: `rope_parameters`, or `rope_theta` with `rope_scaling`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DIALECTS = ("rope_parameters", "rope_theta")
DEFAULT_THETA = 10000.0
# Their angles do not depend on the context's length, so that the target's own can be written.
_FREE_OF_LENGTH = ("default", "linear", "llama3", "yarn")


def spoken(config: Mapping[str, Any]) -> list[str]:
    """The dialects that stand in the config."""
    legacy = config.get("rope_theta") is not None or bool(config.get("rope_scaling"))
    found = {"rope_parameters": bool(config.get("rope_parameters")), "rope_theta": legacy}
    return [dialect for dialect in DIALECTS if found[dialect]]


def parameters(config: Mapping[str, Any], dialects: tuple[str, ...] = DIALECTS) -> dict[str, Any]:
    """{rope_type, rope_theta, ...} as a reader of these dialects, the first one found, understands it."""
    for dialect in dialects:
        if dialect not in spoken(config):
            continue
        source = config.get("rope_scaling") or {} if dialect == "rope_theta" else config["rope_parameters"]
        source = source.get("full_attention", source)  # where each kind of layer has its own (Gemma 3)
        theta = source.get("rope_theta", config.get("rope_theta"))
        return {
            **{key: value for key, value in source.items() if value is not None and key != "type"},
            "rope_type": source.get("rope_type", source.get("type", "default")),
            "rope_theta": DEFAULT_THETA if theta is None else float(theta),
        }
    return {"rope_type": "default", "rope_theta": DEFAULT_THETA}


def set_theta(config: dict[str, Any], theta: float) -> None:
    """Another base, wherever one can stand, in place."""
    config["rope_theta"] = theta
    for dialect in ("rope_parameters", "rope_scaling"):
        if isinstance(config.get(dialect), dict):
            config[dialect] = {**config[dialect], "rope_theta": theta}


def for_context(config: dict[str, Any], context: int) -> None:
    """A draft's config.json made for a target of that context, in place."""
    _complete_yarn(config)
    if config["rope_parameters"]["rope_type"] in _FREE_OF_LENGTH:
        config["max_position_embeddings"] = max(config["max_position_embeddings"], context)


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
