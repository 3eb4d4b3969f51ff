"""Which checkpoint of a run is evaluated, exported and reported: `export.step`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from flaxdraft.files.fetch import sha256_of
from flaxdraft.train.checkpoint import read_saved
from flaxdraft.train.retention import best_of


class Chosen(NamedTuple):
    step: int
    last: int  # of the run's checkpoints
    # Of its metadata, which hold the time of its save: a step that was trained again has another one. None where the
    # run has no checkpoint, as they were removed since or it began with the end of another run.
    sha256: str | None


def choose(directory: Path, which: str, num_steps: int) -> Chosen:
    """As one process sees it; what it chooses stands once training has ended.

    Args:
        directory: of the run's checkpoints.
        which: `best`, which is the latest where none was scored, or `latest`.
        num_steps: of the whole run.
    """
    saved = read_saved(directory)
    if not saved:
        return Chosen(num_steps, num_steps, None)
    chosen = (best_of(saved) if which == "best" else None) or saved[-1]
    metadata = directory / str(chosen.step) / "_CHECKPOINT_METADATA"
    return Chosen(chosen.step, saved[-1].step, sha256_of(metadata))
