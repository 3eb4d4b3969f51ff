"""An engine's contract applied to the heads: one function a clause, each yielding what it finds."""

from __future__ import annotations

from collections.abc import Iterator

from flaxdraft.algorithms.dflash.serving.rules import Rule
from flaxdraft.algorithms.dflash.serving.terms import CONFIG
from flaxdraft.algorithms.dspark.serving.kind import of_head
from flaxdraft.algorithms.dspark.serving.terms import Engine
from flaxdraft.serving.finding import Finding, few
from flaxdraft.serving.view import DraftView


def top_level(engine: Engine, view: DraftView) -> Iterator[Finding]:
    missing = [name for name in of_head(view.config) if view.config.get(name) is None]
    if engine.top_level and missing:
        yield Finding("refused", f"{few(missing)} stand in {CONFIG} alone, it reads them at the top level",
                      "write them there as well")  # fmt: skip


def head_type(engine: Engine, view: DraftView) -> Iterator[Finding]:
    found = of_head(view.config).get("markov_head_type", "vanilla")
    if found not in engine.head_types:
        yield Finding("refused", f"markov_head_type is {found}, it has {few([*engine.head_types])} alone",
                      "train with draft.fields={markov_head_type: vanilla}")  # fmt: skip


def anchor(engine: Engine, view: DraftView) -> Iterator[Finding]:
    if view.config[CONFIG].get("sample_from_anchor") and not engine.nested_anchor:
        yield Finding("refused", f"it stops at {CONFIG}.sample_from_anchor, which it reads at the top level",
                      "write it at the top level alone")  # fmt: skip


RULES: tuple[Rule, ...] = (top_level, head_type, anchor)
