"""Which checkpoints stay: the last few, one in every so many steps, and the best, whatever its age."""

from __future__ import annotations

from collections.abc import Mapping


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
