"""The terms in which engines say what serving the heads needs."""

from __future__ import annotations

import dataclasses
from typing import Any

from flaxdraft.algorithms.dflash.serving import terms
from flaxdraft.algorithms.dspark.sizes import HEAD_TYPES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine(terms.Engine):
    """What one engine reads."""

    head_types: tuple[str, ...] = HEAD_TYPES  # of the Markov head, that it has
    top_level: bool = False  # it reads the heads' fields at the top level of config.json alone
    plain_logits: bool = False  # it passes over the switches that scale and cap logits


def like(table: terms.Engine, **own: Any) -> Engine:
    """An engine that reads the rest as it does of DFlash's drafts."""
    fields: dict[str, Any] = {field.name: getattr(table, field.name) for field in dataclasses.fields(table)} | own
    return Engine(**fields)
