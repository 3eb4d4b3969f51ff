"""Where a config.json names the token of masked places. By that a draft that proposes in one pass is told from a
sequential one, which may have the same architecture name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MASK_FIELDS = ("mask_token_id", "dspark_noise_token_id", "pard_token", "ptd_token_id")  # the first that is there


def mask_tokens_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What each place says, in the order in which engines look."""
    nested = config.get("dflash_config")
    nested = nested if isinstance(nested, Mapping) else {}
    places = {"dflash_config.mask_token_id": nested.get("mask_token_id")}
    places |= {name: config.get(name) for name in MASK_FIELDS}
    return {place: value for place, value in places.items() if value is not None}


def mask_token_of(config: Mapping[str, Any]) -> Any:
    """As engines find it; None where no place names one."""
    return next(iter(mask_tokens_of(config).values()), None)
