"""An engine's contract applied to the head: one function a clause, each yielding what it finds."""

from __future__ import annotations

from collections.abc import Iterator

from flaxdraft.algorithms.dflash.serving.rules import Rule
from flaxdraft.algorithms.dflash.serving.terms import CONFIG
from flaxdraft.algorithms.domino.serving.terms import Engine
from flaxdraft.serving.finding import Finding
from flaxdraft.serving.view import DraftView


def prefix(engine: Engine, view: DraftView) -> Iterator[Finding]:
    found = view.config[CONFIG]["pure_draft_prefix_len"]
    if engine.prefix is not None and found != engine.prefix:
        yield Finding("refused", f"pure_draft_prefix_len is {found}, it serves {engine.prefix} alone",
                      f"train with algorithm.pure_draft_prefix_len={engine.prefix}")  # fmt: skip


def code(engine: Engine, view: DraftView) -> Iterator[Finding]:
    if engine.serves and "auto_map" in view.config:
        yield Finding("refused", "auto_map names code of another trainer, and it runs its own", "leave auto_map out")


def dtype(engine: Engine, view: DraftView) -> Iterator[Finding]:
    found = view.config.get("torch_dtype") or view.config.get("dtype")
    if engine.narrow and found != "bfloat16":
        yield Finding("note", f"weights are {found}, it wants bfloat16 of target and draft", "start it with --dtype "
                      "bfloat16, or export so (export.dtype=bfloat16)")  # fmt: skip


RULES: tuple[Rule, ...] = (prefix, code, dtype)
