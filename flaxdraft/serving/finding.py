"""What a rule says about a draft."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """One thing, what comes of it, how to mend it."""

    # refused: the engine stops. wrong: it serves another network than the trained one. note: nothing comes of it here.
    level: Literal["refused", "wrong", "note"]
    what: str
    mend: str


def few(items: list[str]) -> str:
    """A list that stays readable."""
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")
