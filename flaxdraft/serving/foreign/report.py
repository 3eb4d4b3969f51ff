"""What a user says of another trainer's draft, and what is said to the user."""

from __future__ import annotations

from typing import Literal, NamedTuple

from flaxdraft.serving.foreign.names import Row
from flaxdraft.serving.foreign.vocabulary import Meaning


class Options(NamedTuple):
    """What the user knows and the files do not say."""

    trainer: str | None = None
    table: Meaning | None = None  # what the vocabulary table holds
    recurrence: Literal["pre-norm", "post-norm"] | None = None
    rope_theta: float | None = None


class Report(NamedTuple):
    """What was made of the source."""

    trainer: str | None
    rows: list[Row]
    remarks: list[str]
