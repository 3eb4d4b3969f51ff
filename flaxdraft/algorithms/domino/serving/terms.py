"""The terms in which engines say what serving the head needs."""

from __future__ import annotations

import dataclasses

from flaxdraft.algorithms.dflash.serving import terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine(terms.Engine):
    """What one engine reads."""

    prefix: int | None = None  # the one pure_draft_prefix_len that it knows; None: any
    narrow: bool = False  # weights must be bfloat16
