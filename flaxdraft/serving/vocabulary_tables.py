"""The vocabulary tables among a draft's tensors: offsets to the target ids, and which target tokens it knows."""

from __future__ import annotations

import numpy as np

from flaxdraft.errors import InputError
from flaxdraft.interfaces import VocabMap

OFFSETS, MASK = TABLES = ("d2t", "t2d")


def take(tensors: dict[str, np.ndarray], size: int, vocab_size: int, origin: str) -> VocabMap:
    """Takes the tables out of a draft's tensors; all target tokens where there are none and the draft knows all.

    Raises:
        InputError: there are none where the draft's vocabulary is smaller, they are of another size, or differ from
            each other.
    """
    offsets, mask = (tensors.pop(name, None) for name in TABLES)
    if offsets is None:
        if size < vocab_size:
            raise InputError(
                f"{origin}: no d2t, but draft_vocab_size is {size} of {vocab_size} target tokens; without it "
                "nobody knows what a draft token means. Export the draft again with its vocabulary map"
            )
        offsets = np.zeros(size, np.int64)
    if offsets.shape != (size,):
        raise InputError(f"{origin}: d2t has shape {offsets.shape}, expected ({size},) from draft_vocab_size")
    try:
        vocab = VocabMap.from_offsets(offsets, vocab_size)
    except InputError as error:
        raise InputError(f"{origin}: d2t holds no offsets (target id = i + d2t[i]): {error}") from error
    if mask is not None and not np.array_equal(mask.astype(bool), vocab.tables()[MASK]):
        raise InputError(f"{origin}: t2d is not the membership mask of d2t; export the draft again")
    return vocab
