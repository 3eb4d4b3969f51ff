"""Whole texts as a batch that a target reads in one pass, without a cache.

Shape letters: B rows, T time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flaxdraft.interfaces import Batch


def batch_of(texts: Sequence[Sequence[int] | np.ndarray], num_rows: int, length: int) -> Batch:
    """One text a row, all of it the assistant's, and padding behind it. Padding stands at position 0: some rotary
    embeddings stretch all angles by the farthest position (see `nn.rope.inverse_frequencies`), which must be a text's.

    Args:
        texts: their tokens; the rows behind the last of them are padding.
        num_rows, length: of the batch.
    """
    tokens_BT, segments_BT = np.zeros((num_rows, length), np.int32), np.zeros((num_rows, length), np.int32)
    for i, text in enumerate(texts):
        tokens_BT[i, : len(text)], segments_BT[i, : len(text)] = text, 1
    return Batch(tokens_BT, segments_BT > 0, segments_BT, segments_BT * np.arange(length, dtype=np.int32))
