"""The draft vocabulary: the W most frequent target tokens, special ones always among them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flaxdraft.errors import InputError
from flaxdraft.interfaces import VocabMap


def choose_vocab(counts_V: np.ndarray, special_ids: Sequence[int], draft_vocab_size: int) -> VocabMap:
    """The map of the `draft_vocab_size` most frequent tokens.

    Ties, and places left once every counted token is in, go to the lowest ids: byte-pair merges are learnt by
    frequency, so a low id is the better guess.

    Raises:
        InputError: the size is larger than the vocabulary or smaller than the number of special tokens.
    """
    vocab_size = len(counts_V)
    if not len(special_ids) <= draft_vocab_size <= vocab_size:
        raise InputError(
            f"draft.draft_vocab_size: found {draft_vocab_size}, expected {len(special_ids)} (special tokens) to "
            f"{vocab_size} (the target's vocabulary)"
        )
    rank = counts_V.astype(np.int64).copy()
    rank[list(special_ids)] = np.iinfo(np.int64).max
    chosen = np.argsort(-rank, kind="stable")[:draft_vocab_size]
    return VocabMap(np.sort(chosen), vocab_size)


def coverage(counts_V: np.ndarray, vocab: VocabMap) -> float:
    """Share of the counted tokens that the draft vocabulary holds."""
    return float(counts_V[vocab.target_ids_W].sum() / max(counts_V.sum(), 1))
