"""What a rule says about a draft."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """One thing, what comes of it, how to mend it."""

    # refused: the engine stops. wrong: it serves another network than the trained one. note: nothing comes of it here.
    level: Literal["refused", "wrong", "note"]
    what: str
    mend: str


def first_fault(findings: Iterable[Finding]) -> Finding | None:
    """The first one that is more than a note."""
    return next((finding for finding in findings if finding.level != "note"), None)


def few(items: list[str]) -> str:
    """A list that stays readable."""
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")
