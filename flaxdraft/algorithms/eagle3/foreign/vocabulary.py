"""The tokens that a draft knows, and its head's rows, in ascending order of the target's tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from flaxdraft.algorithms.eagle3.serving.tensors import sizes
from flaxdraft.errors import InputError
from flaxdraft.serving.foreign.vocabulary import Meaning, known_tokens


def order(
    named: dict[str, np.ndarray], config: dict[str, Any], meaning: Meaning | None, remarks: list[str], origin: str
) -> None:
    """d2t as offsets to ascending ids, the head's rows in that order, in place; no tables for a whole vocabulary.

    Raises:
        InputError: the draft brings no head of its own, or no table for a reduced vocabulary; or see `known_tokens`.
    """
    d2t, t2d = named.pop("d2t", None), named.pop("t2d", None)
    head = named.get("lm_head.weight")
    if head is None:
        raise InputError(f"{origin}: no lm_head.weight; a draft without its own head cannot be trained further")
    _, _, vocab_size, draft_vocab_size = sizes(config)
    if head.shape[0] != draft_vocab_size:
        raise InputError(f"{origin}: lm_head.weight has {head.shape[0]} rows, config.json says draft_vocab_size "
                         f"{draft_vocab_size} of {vocab_size}; correct config.json")  # fmt: skip
    config["draft_vocab_size"] = draft_vocab_size
    if d2t is None:
        if draft_vocab_size < vocab_size:
            raise InputError(f"{origin}: no d2t for {draft_vocab_size} of {vocab_size} tokens; put the trainer's into "
                             "the directory (vocab_mapping.pt or d2t.npy)")  # fmt: skip
        return
    known = known_tokens(d2t, t2d, draft_vocab_size, vocab_size, meaning, origin)
    remarks += known.remarks
    named["lm_head.weight"] = head[known.order]
    if draft_vocab_size < vocab_size:
        named |= known.vocab.tables()
