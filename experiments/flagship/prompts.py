"""Prompts that the target writes itself, as Magpie has them (arXiv 2406.08464): it is given the chat template up to the
user's turn and goes on. Here the turn already begins, with the first words of one of the project's training prompts, so
that what follows is as varied as those; nothing of a held-out prompt is read but to leave out what resembles it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

MOST_WORDS = 4  # of a training prompt that a turn begins with; 0 is the template alone
MOST_TOKENS = 80  # of a turn; one that is not done by then is left out
TOO_SIMILAR = 0.6  # share of common words (of both sets together) from which a prompt repeats a held-out one
_MARK = "\x01"


def requests(seeds: Sequence[dict[str, str]], count: int, seed: int) -> list[tuple[str, str]]:
    """(category, beginning of the user's turn) of so many prompts to be written."""
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        origin, words = chance.choice(seeds), chance.randint(0, MOST_WORDS)
        opening = " ".join(origin["prompt"].split()[:words])
        found.append((origin["category"] if words else "free", opening))
    return found


def beginnings(tokenizer: Any, openings: Iterable[str]) -> list[list[int]]:
    """Tokens of the template up to the user's turn, and of how the turn begins."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
    header = text[: text.index(_MARK)]
    return [tokenizer(header + opening, add_special_tokens=False)["input_ids"] for opening in openings]


def words_of(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


class Kept:
    """Which prompts are new: of three words or more, in plain text, no copy of one before and unlike all held out."""

    def __init__(self, held_out: Iterable[str]):
        self._held_out = [words_of(text) for text in held_out]
        self._seen: set[frozenset[str]] = set()

    def add(self, text: str) -> bool:
        """Whether it is new, which it then no longer is."""
        words = words_of(text)
        if len(words) < 3 or words in self._seen or "<|" in text or "\ufffd" in text:
            return False
        if any(len(words & other) >= TOO_SIMILAR * len(words | other) for other in self._held_out):
            return False
        self._seen.add(words)
        return True


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)
