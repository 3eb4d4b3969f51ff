"""What is said of a target whose configuration ties its head to its embedding, and whose files hold another head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flaxdraft.progress import CONSOLE

if TYPE_CHECKING:
    from flaxdraft.targets import OpenedTarget

HEAD = "lm_head.weight"
_ROWS = 4096  # compared at a time


def say_which_head(opened: OpenedTarget) -> None:
    """Says that the embedding is the head where another one is stored: serving engines take the embedding, transformers
    takes the stored head, and who compares with the latter must know."""
    config = opened.config()
    names = {name.rpartition("model.")[2]: name for name in opened.source.names()}
    if not config.tie_word_embeddings or HEAD not in names:
        return
    (embedding,) = [name for path, name, _ in opened.family.name_table(config) if path == "embed"]
    if not _equal(opened, embedding, names[HEAD]):
        CONSOLE.print(
            f"{opened.path}: config.json says tie_word_embeddings, and the stored {names[HEAD]} differs from "
            f"{embedding}. The embedding is used as head, as serving engines do; transformers takes the stored head. "
            "If the target is meant to have that, set tie_word_embeddings to false in its config.json"
        )


def _equal(opened: OpenedTarget, one: str, other: str) -> bool:
    source, (num, width) = opened.source, opened.source.shape(one)
    if source.shape(other) != (num, width):
        return False
    rows = (slice(at, min(at + _ROWS, num)) for at in range(0, num, _ROWS))
    return all(
        np.array_equal(source.read(one, (span, slice(0, width))), source.read(other, (span, slice(0, width))))
        for span in rows
    )
