"""Sizes of padded arrays: few different ones, since each is compiled."""

from __future__ import annotations


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not smaller."""
    return -(-value // multiple) * multiple


def even_part(total: int, most: int) -> int:
    """The size of parts of at most `most`, as few as there can be, that hold `total` with the least left over."""
    return -(-total // -(-total // most))
