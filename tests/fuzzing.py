"""Hypothesis for a time instead of a number of examples: what is not found in a second may be in ten minutes."""

import itertools
import time

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

SHORT = 5
LONG = pytest.param(300, marks=(pytest.mark.slow, pytest.mark.exhaustive))
SECONDS = [SHORT, LONG]
FEW, MANY = 25, 200  # examples at once: a short search ends soon after its time
_USUAL = settings(
    deadline=None, database=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.target, Phase.shrink],
)  # fmt: skip


def fuzz(check, strategy, seconds: float) -> int:
    """Calls check(example) for `seconds`; returns how often. A failure is shrunk, and shown as code for a test.

    A short search draws the same examples every time, as many as there is time for, so that a change is judged by what
    it changes. A long one begins elsewhere every time.
    """
    count, deadline = 0, time.monotonic() + seconds
    short = seconds <= SHORT
    seeds = itertools.count(0 if short else time.time_ns())
    at_once = settings(_USUAL, max_examples=FEW if short else MANY)

    def counted(example):
        nonlocal count
        count += 1
        check(example)

    while time.monotonic() < deadline:
        seed(next(seeds))(at_once(given(strategy)(counted)))()
    return count
