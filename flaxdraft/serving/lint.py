"""A draft against every contract: verdicts as data, as a table, and as what an export must not contain."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from flaxdraft.algorithms.eagle3.serving import rules, sanity
from flaxdraft.algorithms.eagle3.serving.contract import Engine, engines
from flaxdraft.algorithms.eagle3.serving.fields import malformed, sizeless
from flaxdraft.serving.finding import Finding, few
from flaxdraft.serving.view import DraftView

DIRECTORY = "the directory"
PORTABLE = ("sglang", "vllm")  # what one directory can satisfy at once for every draft


class Verdict(NamedTuple):
    """What one engine would do with the draft."""

    name: str
    title: str
    findings: list[Finding]
    loads: bool

    @property
    def faithful(self) -> bool:
        """It serves the network that was trained."""
        return not any(finding.level != "note" for finding in self.findings)


def of_engine(engine: Engine, view: DraftView) -> list[Finding]:
    return [finding for rule in (*rules.CONFIG_RULES, *rules.TENSOR_RULES) for finding in rule(engine, view)]


def of_directory(view: DraftView) -> list[Finding]:
    return [finding for rule in (*sanity.TENSOR_RULES, *sanity.CONFIG_RULES) for finding in rule(view)]


def stops(findings: Iterable[Finding]) -> bool:
    return any(finding.level == "refused" for finding in findings)


def unreadable(view: DraftView) -> list[Finding]:
    """What makes every further question meaningless."""
    if "speculators_model_type" in view.config:
        return [Finding("refused", "config.json is in the speculators form, which vLLM alone reads, for Llama and "
                        "Qwen3 layers", "convert it with tools/convert/from_pytorch.py")]  # fmt: skip
    bad = [*sizeless(view.config), *malformed(view.config)]
    if bad:
        return [Finding("refused", f"config.json: {few(bad)}", "write it again")]
    return []


def check(view: DraftView) -> list[Verdict]:
    """The directory itself first, then each engine."""
    fatal = unreadable(view)
    if fatal:
        return [Verdict(DIRECTORY, "", fatal, loads=False)]
    found = of_directory(view)
    verdicts = [Verdict(DIRECTORY, "", found, loads=not stops(found))]
    for name, engine in engines().items():
        if engine.serves:
            own = of_engine(engine, view)
            verdicts.append(Verdict(name, engine.title, own, loads=not stops([*found, *own])))
    return verdicts


def passes(verdicts: Sequence[Verdict], wanted: Iterable[str] = PORTABLE) -> bool:
    """Nothing but notes for the directory and the wanted engines."""
    names = {DIRECTORY, *wanted}
    return all(verdict.faithful for verdict in verdicts if verdict.name in names)


def as_json(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    return [
        {"engine": v.name, "version": v.title, "loads": v.loads, "faithful": v.faithful,
         "findings": [finding._asdict() for finding in v.findings]}
        for v in verdicts
    ]  # fmt: skip


def as_table(verdicts: Sequence[Verdict]) -> Table:
    """Engine, whether it loads the draft, what it makes of it, how to mend that."""
    table = Table(box=box.SIMPLE, show_lines=True, pad_edge=False)
    table.add_column("engine", no_wrap=True)
    table.add_column("loads", no_wrap=True)
    table.add_column("what it would do", ratio=3, overflow="fold")
    table.add_column("how to mend it", ratio=2, overflow="fold")
    for verdict in verdicts:
        loads = "" if verdict.name == DIRECTORY else "yes" if verdict.loads else "no"
        name = verdict.name if not verdict.title else f"{verdict.name}\n({verdict.title})"
        cells = [(f"{f.level}: {f.what}", f.mend) for f in verdict.findings] or [("nothing amiss", "")]
        for i, (what, mend) in enumerate(cells):
            table.add_row(name if i == 0 else "", loads if i == 0 else "", what, mend)
    return table
