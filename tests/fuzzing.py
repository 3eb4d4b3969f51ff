"""Hypothesis for a time instead of a number of examples: what is not found in a second may be in ten minutes."""

import time

import pytest
from hypothesis import HealthCheck, Phase, given, settings

# By default, and under `slow`.
SECONDS = [5, pytest.param(120, marks=pytest.mark.slow)]
_AT_ONCE = settings(
    max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.target, Phase.shrink],
)  # fmt: skip


def fuzz(check, strategy, seconds: float) -> int:
    """Calls check(example) for `seconds`; returns how often. A failure is shrunk, and shown as code for a test."""
    count, deadline = 0, time.monotonic() + seconds

    def counted(example):
        nonlocal count
        count += 1
        check(example)

    while time.monotonic() < deadline:
        _AT_ONCE(given(strategy)(counted))()
    return count
