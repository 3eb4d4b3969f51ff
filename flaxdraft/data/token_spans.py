"""Which tokens lie in which part of a text, and which tokens there are.

A tokenizer's post-processor is free to trim the white space off the offsets that it reports (GPT-2's does), and a token
of nothing else then begins and ends nowhere. Masks are made with offsets from before it.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from flaxdraft.errors import InputError


@functools.lru_cache(maxsize=4)
def _untrimmed(tokenizer: Any) -> Tokenizer:
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]  # its stub knows no None
    inner.no_truncation()
    inner.no_padding()
    return inner


def encode(tokenizer: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and where in the text each begins: int32 [L], int64 [L]."""
    found = _untrimmed(tokenizer).encode(text, add_special_tokens=False)
    return np.asarray(found.ids, np.int32), np.asarray([start for start, _ in found.offsets], np.int64)


def within(starts_L: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Tokens that begin in the span. One that began before it was not produced there."""
    return (starts_L >= begin) & (starts_L < end)


@functools.lru_cache(maxsize=4)
def _known(tokenizer: Any) -> np.ndarray:
    """Which ids stand for a token, as bool. Ids may have holes, and go beyond the number of tokens."""
    ids = np.fromiter(tokenizer.get_vocab().values(), np.int64)
    known = np.zeros(ids.max(initial=0) + 1, bool)
    known[ids] = True
    return known


def check_tokens(tokens_L: np.ndarray, tokenizer: Any | None, vocab_size: int | None, where: str) -> None:
    """Refuses tokens that the tokenizer or the target has not.

    Args:
        tokenizer: that must know them; None where the target wrote them itself. An embedding may have rows that stand
            for nothing, and its target writes them now and then.
        vocab_size: rows of the target's embedding; None where they are not known.

    Raises:
        InputError: a token stands for nothing, or the target has no embedding for it.
    """
    if tokenizer is not None:
        known = _known(tokenizer)
        inside = tokens_L < len(known)
        unknown = tokens_L[~inside | ~known[np.where(inside, tokens_L, 0)]]
        if unknown.size:
            raise InputError(
                f"{where}: token {unknown[0]} is outside the tokenizer's {known.sum()}; the row was tokenised for "
                "another target"
            )
    if vocab_size is not None and tokens_L.max(initial=0) >= vocab_size:
        raise InputError(
            f"{where}: token {tokens_L.max()} has no row in the target's embedding of {vocab_size}; leave the row out"
        )
