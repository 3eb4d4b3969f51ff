"""A trace of a few steps, for XProf or Perfetto."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax

from flaxdraft.progress import CONSOLE


class Trace:
    """Traces the steps first to last (counted from 1, both included)."""

    def __init__(self, span: Sequence[int] | None, directory: Path):
        self._span, self._directory, self._on = span, directory, False

    def before(self, step: int) -> None:
        if self._span is not None and step == self._span[0]:
            jax.profiler.start_trace(self._directory)
            self._on = True

    def after(self, step: int, done: jax.Array) -> None:
        """`done` is a result of the step: the trace must hold all of it."""
        if self._span is not None and self._on and step == self._span[1]:
            jax.block_until_ready(done)
            self.close()
            CONSOLE.print(f"  trace of steps {self._span[0]} to {self._span[1]}: {self._directory}")

    def close(self) -> None:
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
