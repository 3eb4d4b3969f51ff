"""Which target tokens a draft of a reduced vocabulary knows, from another trainer's tables. Engines want offsets,
target id = i + offset[i], in ascending order of the target ids; others have written ids themselves, or another order.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from flaxdraft.errors import InputError
from flaxdraft.interfaces import VocabMap

Meaning = Literal["offsets", "ids"]
_MEND = "give --d2t offsets or --d2t ids if you know which"


class Known(NamedTuple):
    """The tokens of a draft, in ascending order."""

    vocab: VocabMap
    order: np.ndarray  # the rows of the file's head in that order
    remarks: list[str]


def known_tokens(
    table: np.ndarray, member: np.ndarray | None, size: int, vocab_size: int, meaning: Meaning | None, origin: str
) -> Known:  # fmt: skip
    """
    Args:
        table: for each draft token its target id, or the offset to it.
        member: whether the draft knows each target token; None where the file does not say.
        size: tokens of the draft, of `vocab_size` that there are.

    Raises:
        InputError: the tables are of other sizes; see `target_ids` for the rest.
    """
    if table.shape != (size,) or (member is not None and member.shape != (vocab_size,)):
        found = [None if one is None else one.shape for one in (table, member)]
        raise InputError(f"{origin}: d2t and t2d have shapes {found[0]} and {found[1]}, expected "
                         f"{(size,)} and {(vocab_size,)}")  # fmt: skip
    ids, found = target_ids(table, member, vocab_size, meaning, origin)
    remarks = ["d2t held target ids; offsets are written"] if found == "ids" else []
    order = np.argsort(ids)
    if not np.array_equal(order, np.arange(size)):
        remarks.append("target ids did not ascend; lm_head's rows were sorted along with them")
    return Known(VocabMap(ids[order], vocab_size), order, remarks)


def target_ids(
    table: np.ndarray, member: np.ndarray | None, vocab_size: int, meaning: Meaning | None, origin: str
) -> tuple[np.ndarray, Meaning]:
    """The target id of each draft token, in the file's order, and what the table turned out to hold.

    With the mask only one reading can agree. Without it a reading must be possible at all (distinct ids of the
    vocabulary); where both are, nobody can tell, and the caller has to say.

    Raises:
        InputError: neither reading fits, or both do.
    """
    table = table.astype(np.int64)
    readings: dict[Meaning, np.ndarray] = {"offsets": table + np.arange(len(table)), "ids": table}
    fitting: list[Meaning] = [
        name for name, ids in readings.items()
        if _possible(ids, vocab_size) and (member is None or _agrees(ids, member))
    ]  # fmt: skip
    if meaning is not None:
        fitting = [name for name in fitting if name == meaning]
    if len(fitting) == 1:
        return readings[fitting[0]], fitting[0]
    if not fitting:
        against = "t2d" if member is not None else f"a vocabulary of {vocab_size}"
        raise InputError(f"{origin}: d2t fits {against} neither as offsets nor as target ids" if meaning is None else
                         f"{origin}: d2t does not fit {against} as {meaning}")  # fmt: skip
    raise InputError(f"{origin}: d2t can be read as offsets and as target ids, and there is no t2d to tell; {_MEND}")


def _possible(ids: np.ndarray, vocab_size: int) -> bool:
    return bool(ids.min() >= 0 and ids.max() < vocab_size and len(np.unique(ids)) == len(ids))


def _agrees(ids: np.ndarray, member: np.ndarray) -> bool:
    return np.array_equal(np.flatnonzero(member), np.sort(ids))
