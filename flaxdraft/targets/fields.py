"""Fields of a target's config.json, checked by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flaxdraft.errors import InputError
from flaxdraft.files.through_an_engine import THROUGH_AN_ENGINE


def check_positive(config: Mapping[str, Any], *names: str) -> None:
    """
    Raises:
        InputError: one of the fields is no positive integer.
    """
    for name in names:
        if not isinstance(config.get(name), int) or config[name] < 1:
            raise InputError(f"target config: {name}: found {config.get(name)!r}, expected a positive integer")


def check_only(config: Mapping[str, Any], name: str, known: Sequence[Any]) -> None:
    """
    Args:
        known: the values that are supported, of which an absent field has the first.

    Raises:
        InputError: the field has another value.
    """
    if config.get(name, known[0]) not in known:
        raise InputError(
            f"target config: {name}: found {config[name]!r}, only {' or '.join(map(repr, known))} is supported; take "
            f"another model, or write a family that has it (CONTRIBUTING.md). {THROUGH_AN_ENGINE}"
        )
