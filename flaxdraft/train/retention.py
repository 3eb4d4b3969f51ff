"""Which checkpoints stay: the last few, one in every so many steps, and the best, whatever its age.

A run's settings may have changed between two starts, so that its scores measure different things. Only those compete
that measure what the newest one does.

Orbax's preservation policies could say `kept`, and nothing would get shorter: they judge Orbax's own metadata, which
would have to be made from our records, `BestN` takes the last of equal scores, and `best` is asked for beside them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Saved:
    """One complete checkpoint on disk."""

    step: int
    record: Mapping[str, Any]

    @property
    def score(self) -> float | None:
        return self.record["score"]

    @property
    def measure(self) -> Mapping[str, Any] | None:
        """What the score is of; None in the checkpoints of older runs, which did not say."""
        return self.record.get("measure")


def competing(saved: Iterable[Saved]) -> dict[int, float | None]:
    """The scores by step; None where there is none, or where it measures something else than the newest score."""
    saved = list(saved)
    newest = max((one for one in saved if one.score is not None), key=lambda one: one.step, default=None)
    return {one.step: one.score if newest and one.measure == newest.measure else None for one in saved}


def best_of(saved: Iterable[Saved]) -> Saved | None:
    """The one with the best of the competing scores."""
    by_step = {one.step: one for one in saved}
    step = best(competing(by_step.values()))
    return None if step is None else by_step[step]


def best(scores: Mapping[int, float | None]) -> int | None:
    """The step with the highest score, the first of them if several have it; None where nothing was scored."""
    scored = {step: score for step, score in scores.items() if score is not None}
    return min(scored, key=lambda step: (-scored[step], step)) if scored else None


def kept(scores: Mapping[int, float | None], latest: int, every: int | None) -> set[int]:
    """The steps to keep of those that exist.

    Args:
        scores: of every complete checkpoint by its step, higher is better; None where it was not evaluated.
        latest: how many of the newest stay.
        every: steps that it divides stay as well; None keeps none for that reason.
    """
    stay = set(sorted(scores)[-latest:])
    if every is not None:
        stay |= {step for step in scores if step % every == 0}
    winner = best(scores)
    return stay if winner is None else stay | {winner}
