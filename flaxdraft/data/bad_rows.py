"""The rows of a file that cannot be used: all of them are found in one run, and either end it or are left out."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from flaxdraft.errors import InputError
from flaxdraft.progress import CONSOLE

OnBadRow = Literal["stop", "skip"]
SHOWN = 10


@dataclasses.dataclass
class BadRows:
    """The message of each bad row, which begins with the row's name."""

    file: str
    policy: OnBadRow = "stop"
    field: str | None = "--on-bad-row "  # where the user may say otherwise; None: nowhere
    messages: list[str] = dataclasses.field(default_factory=list)

    def add(self, error: InputError) -> None:
        self.messages.append(str(error))

    def judge(self) -> None:
        """Says which rows are left out, once all are read.

        Raises:
            InputError: there are some, and they are to stop the run.
        """
        if not self.messages:
            return
        found = f"{self.file}: {len(self.messages)} bad row{'s' * (len(self.messages) > 1)}"
        listed = "".join(f"\n  {message}" for message in self.messages[:SHOWN])
        if len(self.messages) > SHOWN:
            listed += f"\n  and {len(self.messages) - SHOWN} more"
        if self.policy == "stop":
            otherwise = "" if self.field is None else f", or leave them out with {self.field}skip"
            raise InputError(f"{found}; mend them{otherwise}:{listed}")
        CONSOLE.print(f"{found} left out:{listed}", markup=False)

    def by_kind(self) -> dict[str, list[str]]:
        """The messages of each kind: those that differ in numbers and in what was found alone."""
        kinds: dict[str, list[str]] = {}
        for message in self.messages:
            text = re.sub(r"^.*? row \d+: ", "", message.splitlines()[0])
            kind = re.sub(r"found .*?(?=, expected|;|$)|\[\d+\]|\d+|'[^']*'|\([^)]*\)", "", text)
            kinds.setdefault(" ".join(kind.split())[:90], []).append(message)
        return kinds
