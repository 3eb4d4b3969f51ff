"""Progress of long work: a live bar in a terminal, a line now and then in a log file.

In a run of many processes the first one alone speaks; each writes what it would say, and what libraries log, to a file
of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0


class _Console(Console):
    """A console that repeats every line in the process's log, where there is one."""

    copy: Console | None = None

    def print(self, *objects: Any, **kwargs: Any) -> None:
        super().print(*objects, **kwargs)
        if self.copy is not None:
            self.copy.print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} ", *objects, end="\n", **kwargs)


CONSOLE = _Console(highlight=False, soft_wrap=True, markup=False)  # paths may hold brackets


@contextmanager
def process_log(path: Path, *, speaks: bool) -> Iterator[None]:
    """Within it, lines of the console and of the loggers (from warnings up) are also appended to a file.

    Args:
        speaks: whether this process prints to its terminal.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.setLevel(logging.WARNING)
    quiet, CONSOLE.quiet = CONSOLE.quiet, not speaks
    logging.getLogger().addHandler(handler)
    with path.open("a", encoding="utf-8") as file:
        CONSOLE.copy = Console(file=file, highlight=False, soft_wrap=True, markup=False, width=200)
        try:
            yield
        finally:
            CONSOLE.copy, CONSOLE.quiet = None, quiet
            logging.getLogger().removeHandler(handler)
            handler.close()


class Bar:
    """advance(n, text) after each piece of work; text holds the rates and figures of the moment."""

    def __init__(self, name: str, total: int, live: Progress | None, done: int):
        self.name, self.total, self.done = name, total, float(done)
        self._first, self._start, self._spoke = done, time.monotonic(), time.monotonic()
        self._line = (live, live.add_task(name, total=total, completed=done, text="")) if live else None

    def advance(self, num: float, text: str) -> None:
        self.done += num
        if self._line is not None:
            live, task = self._line
            live.update(task, completed=round(self.done), text=text)
        elif time.monotonic() - self._spoke > SECONDS_BETWEEN_LINES:
            self._spoke = time.monotonic()
            worked = self.done - self._first
            left = f"{(self._spoke - self._start) / worked * (self.total - self.done):.0f} s" if worked else "unknown"
            CONSOLE.print(f"  {self.name} {self.done:.0f}/{self.total}  {text}  ETA {left}")


@contextmanager
def bar(name: str, total: int, done: int = 0) -> Iterator[Bar]:
    """A bar of `total` pieces, of which `done` were there before."""
    if not CONSOLE.is_terminal or CONSOLE.quiet:
        yield Bar(name, total, None, done)
        return
    columns = (
        TextColumn("  {task.description}"), BarColumn(30), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=CONSOLE) as live:
        yield Bar(name, total, live, done)
