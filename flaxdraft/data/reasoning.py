"""Which tokens of an answer are reasoning: what stands between <think> and </think>, tags included.

Tags are looked for in what the tokens decode to, so that rows which come as tokens are masked like rows of text. The
opening tag may stand in the prompt (templates of R1's kind write it there), or be left out of a conversation's text:
reasoning then begins with the turn. An answer that was cut while it reasoned is reasoning to its end.
"""

from __future__ import annotations

import bisect
from typing import Any

import numpy as np

OPEN, CLOSE = "<think>", "</think>"
_WINDOW = 64  # tokens that are searched together


def without_reasoning(tokenizer: Any, tokens_L: np.ndarray, assistant_L: np.ndarray) -> np.ndarray:
    """The mask without reasoning; bool [L]."""
    ids = tokens_L.tolist()
    tags = sorted(
        [(*span, OPEN) for span in _tags(tokenizer, ids, OPEN)]
        + [(*span, CLOSE) for span in _tags(tokenizer, ids, CLOSE)]
    )
    kept = assistant_L.copy()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], assistant_L, [False]])))
    for begin, end in edges.reshape(-1, 2).tolist() if tags else ():
        for first, last in _reasoning(tokenizer, ids, tags, begin, end):
            kept[first:last] = False
    return kept


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _tags(tokenizer: Any, ids: list[int], tag: str) -> list[tuple[int, int]]:
    """(first token, token behind the last) of each tag. A token may begin with its last character and go on."""
    found, at = [], 0
    if tag not in _decoded(tokenizer, ids):
        return found
    while at < len(ids):
        window = ids[at : at + _WINDOW]
        if tag not in _decoded(tokenizer, window):
            at += _WINDOW - len(tag)  # of its characters each may be a token
            continue
        ends = range(1, len(window) + 1)
        end = ends[bisect.bisect_left(ends, True, key=lambda end: tag in _decoded(tokenizer, window[:end]))]
        start = next(start for start in reversed(range(end)) if tag in _decoded(tokenizer, window[start:end]))
        found.append((at + start, at + end))
        at += end
    return found


def _reasoning(tokenizer: Any, ids: list[int], tags: list[tuple[int, int, str]], begin: int, end: int):
    """Spans of reasoning in the turn [begin, end)."""
    inside = [tag for tag in tags if begin <= tag[0] < end]
    before = [tag for tag in tags if tag[1] <= begin]
    opened = None
    if before and before[-1][2] == OPEN and not _decoded(tokenizer, ids[before[-1][1] : begin]).strip():
        opened = begin  # by the prompt
    elif inside and inside[0][2] == CLOSE:
        opened = begin  # by a tag that the text leaves out
    for first, last, tag in inside:
        if tag == OPEN and opened is None:
            opened = first
        elif tag == CLOSE and opened is not None:
            yield opened, last
            opened = None
    if opened is not None and not _decoded(tokenizer, ids[begin:opened]).strip():
        yield opened, end
