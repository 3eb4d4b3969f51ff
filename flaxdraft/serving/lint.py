"""A draft against every engine: verdicts as data, as a table, and as what an export must not contain."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from flaxdraft.serving.contract import Contract, of_engine
from flaxdraft.serving.finding import Finding, first_fault
from flaxdraft.serving.view import DraftView

DIRECTORY = "the directory"


class Verdict(NamedTuple):
    """What one engine would do with the draft."""

    name: str
    title: str
    portable: bool  # of the engines that one directory satisfies at once, or the directory itself
    findings: list[Finding]
    loads: bool

    @property
    def faithful(self) -> bool:
        """It serves the network that was trained."""
        return first_fault(self.findings) is None


def stops(findings: Iterable[Finding]) -> bool:
    return any(finding.level == "refused" for finding in findings)


def check(view: DraftView, contract: Contract) -> list[Verdict]:
    """The directory itself first, then each engine.

    Args:
        contract: of the algorithm that the draft is of.
    """
    fatal = contract.unreadable(view)
    found = fatal or contract.of_directory(view)
    verdicts = [Verdict(DIRECTORY, "", True, found, loads=not stops(found))]
    for name, engine in contract.engines().items():
        if engine.serves and not fatal:
            own = of_engine(contract, engine, view)
            verdicts.append(Verdict(name, engine.title, engine.portable, own, loads=not stops([*found, *own])))
    return verdicts


def passes(verdicts: Sequence[Verdict], wanted: Collection[str] = ()) -> bool:
    """Nothing but notes for the directory and the wanted engines, by default the portable ones."""
    asked = [v for v in verdicts if v.name == DIRECTORY or (v.name in wanted if wanted else v.portable)]
    return all(verdict.faithful for verdict in asked)


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
