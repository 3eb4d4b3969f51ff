"""What a foreign d2t means. Engines want offsets, target id = i + d2t[i], in ascending order of the target ids; others
have written ids themselves, or offsets in another order."""

from __future__ import annotations

from typing import Literal

import numpy as np

from flaxdraft.errors import InputError

Meaning = Literal["offsets", "ids"]
_MEND = "give --d2t offsets or --d2t ids if you know which"


def target_ids(
    d2t: np.ndarray, t2d: np.ndarray | None, vocab_size: int, meaning: Meaning | None, origin: str
) -> tuple[np.ndarray, Meaning]:
    """The target id of each draft token, in the file's order, and what d2t turned out to hold.

    With t2d only one reading can agree with it. Without it a reading must be possible at all (distinct ids of the
    vocabulary); where both are, nobody can tell, and the caller has to say.

    Raises:
        InputError: neither reading fits, or both do.
    """
    d2t = d2t.astype(np.int64)
    readings: dict[Meaning, np.ndarray] = {"offsets": d2t + np.arange(len(d2t)), "ids": d2t}
    fitting: list[Meaning] = [
        name for name, ids in readings.items() if _possible(ids, vocab_size) and (t2d is None or _agrees(ids, t2d))
    ]
    if meaning is not None:
        fitting = [name for name in fitting if name == meaning]
    if len(fitting) == 1:
        return readings[fitting[0]], fitting[0]
    if not fitting:
        against = "t2d" if t2d is not None else f"a vocabulary of {vocab_size}"
        raise InputError(f"{origin}: d2t fits {against} neither as offsets nor as target ids" if meaning is None else
                         f"{origin}: d2t does not fit {against} as {meaning}")  # fmt: skip
    raise InputError(f"{origin}: d2t can be read as offsets and as target ids, and there is no t2d to tell; {_MEND}")


def _possible(ids: np.ndarray, vocab_size: int) -> bool:
    return bool(ids.min() >= 0 and ids.max() < vocab_size and len(np.unique(ids)) == len(ids))


def _agrees(ids: np.ndarray, t2d: np.ndarray) -> bool:
    return np.array_equal(np.flatnonzero(t2d), np.sort(ids))
