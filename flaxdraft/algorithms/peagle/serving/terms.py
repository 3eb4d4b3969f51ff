"""The terms in which engines say what serving a parallel draft needs: EAGLE-3's, and why most serve none."""

from __future__ import annotations

import dataclasses

from flaxdraft.algorithms.eagle3.serving import terms
from flaxdraft.algorithms.eagle3.serving.terms import Served
from flaxdraft.serving.contract import like

KIND = "parallel"  # the name of such drafts in tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine(terms.Engine):
    """What one engine reads from config.json and the weights."""

    why_not: str | None = None  # it serves no such drafts


def serving(table: terms.Engine, served: Served, serve: str | None) -> Engine:
    """An engine that serves parallel drafts as it does sequential ones, but for the command."""
    return like(table, Engine, kinds={KIND: served}, serve=serve)


def refusing(table: terms.Engine, why_not: str) -> Engine:
    """An engine that serves sequential drafts alone."""
    return like(table, Engine, kinds={}, portable=False, why_not=why_not)
