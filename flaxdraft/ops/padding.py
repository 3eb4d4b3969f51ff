"""Sizes of padded arrays: few different ones, since each is compiled."""

from __future__ import annotations


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not smaller."""
    return -(-value // multiple) * multiple
