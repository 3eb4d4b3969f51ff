"""Figures of the steps since the last log: kept on the device, read together, turned into rates and one line."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax

from flaxdraft.data.pipeline import Pipeline
from flaxdraft.devices import host_reads
from flaxdraft.progress import Bar
from flaxdraft.train import token_counter as counting
from flaxdraft.train.guards import BrokenSteps
from flaxdraft.train.metrics_log import MetricsLog, training_figures
from flaxdraft.train.step import StepMetrics

T = TypeVar("T")


class Meters:
    """One for each time that a run is started."""

    def __init__(self, log: MetricsLog, progress: Bar, broken: BrokenSteps, pipeline: Pipeline, tokens: int):
        """
        Args:
            tokens: trained on before.
        """
        self._log, self._progress, self._broken, self._pipeline = log, progress, broken, pipeline
        self._tokens = tokens
        self._pending: list[tuple[int, Any]] = []
        self.waited = 0.0  # seconds for data, since the last log
        self._clock = time.monotonic()

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches; what each takes to come is waiting for data. Placing it and the target's pass over it are not:
        the device works meanwhile."""
        iterator = iter(batches)
        while True:
            asked = time.monotonic()
            batch = next(iterator, None)
            self.waited += time.monotonic() - asked
            if batch is None:
                return
            yield batch

    def note(self, step: int, metrics: StepMetrics) -> None:
        """After each step (counted from 0); nothing is read."""
        self._pending.append((step, metrics))

    def log(self, counters: counting.Counters) -> None:
        """Reads what was noted, once, and writes the last step's figures.

        Raises:
            InputError: too many steps in a row were not finite.
        """
        metrics, counted = host_reads.read(([one for _, one in self._pending], counters))
        for (step, _), one in zip(self._pending, metrics, strict=True):
            self._broken.note(step, one.loss, one.grad_norm, self._pipeline)
        done = self._pending[-1][0] + 1
        seconds, tokens = time.monotonic() - self._clock, counting.tokens(counted)
        figures = training_figures(metrics[-1]) | {
            "tokens": tokens, "tokens_per_second": (tokens - self._tokens) / seconds,
            "data_wait": self.waited / seconds,
        }  # fmt: skip
        self._log.write(done, "train", figures)
        self._progress.advance(done - self._progress.done, _line(figures))
        self._pending, self._tokens = [], tokens
        self.waited, self._clock = 0.0, time.monotonic()

    @contextmanager
    def paused(self, arrays: Any) -> Iterator[None]:
        """Within it time does not count: evaluation and saving are not training.

        Args:
            arrays: of the newest step. The steps that the device has not finished are training, so they are waited for
                first (nothing is read).
        """
        jax.block_until_ready(arrays)
        began = time.monotonic()
        yield
        self._clock += time.monotonic() - began


def _line(figures: dict[str, Any]) -> str:
    accuracy = " ".join(f"{a:.2f}" for a in figures["accuracy"])
    # The mean over rows is no accept length: that is walked or decoded (evaluate/walk.py), and smaller.
    mean = f"1 + mean accepted {figures['mean_over_rows']:.2f}  " if "mean_over_rows" in figures else ""
    return (
        f"loss {figures['loss']:.3f}  accuracy {accuracy}  {mean}"
        f"{figures['tokens_per_second']:.0f} tokens/s  {figures['data_wait']:.0%} waiting for data"
    )
