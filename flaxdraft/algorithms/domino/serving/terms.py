"""The terms in which engines say what serving the head needs."""

from __future__ import annotations

import dataclasses
from typing import Any

from flaxdraft.algorithms.dflash.serving import terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine(terms.Engine):
    """What one engine reads."""

    prefix: int | None = None  # the one pure_draft_prefix_len that it knows; None: any
    plain_logits: bool = False  # it passes over the switches that scale and cap logits
    narrow: bool = False  # weights must be bfloat16


def like(table: terms.Engine, **own: Any) -> Engine:
    """An engine that reads the rest as it does of DFlash's drafts."""
    fields: dict[str, Any] = {field.name: getattr(table, field.name) for field in dataclasses.fields(table)} | own
    return Engine(**fields)
