"""RoPE in config.json, in the dialect that a reader knows: `rope_parameters`, or `rope_theta` with `rope_scaling`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DIALECTS = ("rope_parameters", "rope_theta")
DEFAULT_THETA = 10000.0


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
        theta = source.get("rope_theta", config.get("rope_theta"))
        return {
            **{key: value for key, value in source.items() if value is not None and key != "type"},
            "rope_type": source.get("rope_type", source.get("type", "default")),
            "rope_theta": DEFAULT_THETA if theta is None else float(theta),
        }
    return {"rope_type": "default", "rope_theta": DEFAULT_THETA}
