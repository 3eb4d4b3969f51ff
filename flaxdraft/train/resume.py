"""Where a run goes on: which checkpoint it takes, and what must be the same.

`train.resume` is one of
- `auto`: the newest complete checkpoint; without any, from nothing. One that cannot be read is set aside and the one
  before it is taken.
- `latest`, `best`, `step N`: that checkpoint of this run, or an error. Newer ones are set aside.
- a directory: a checkpoint of another run (of the same inputs).
- `none`: from nothing; an error where there are checkpoints.

A run that was begun from `best`, `step N` or a directory and is started again by the same command goes on from its own
newest checkpoint: launchers may repeat any command. A run that has ended is trained again from `best` or `step N` where
that is not its last checkpoint; the same command then goes on with it, and shows the result once that is done.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxdraft.errors import InputError
from flaxdraft.interfaces import VocabMap
from flaxdraft.progress import CONSOLE
from flaxdraft.stages import same_inputs
from flaxdraft.train.checkpoint import Checkpoints, DamagedError, load, read_record, read_saved
from flaxdraft.train.retention import Saved, best_of
from flaxdraft.train.state import SCHEMA


class Begun(NamedTuple):
    """A state to go on from."""

    arrays: dict[str, Any]  # state and counters
    record: Mapping[str, Any]


class Resume(NamedTuple):
    """What a run asks for and what it is."""

    request: str  # train.resume
    inputs: Mapping[str, Any]
    vocab: VocabMap
    allowed: Iterable[str] = ()  # fields that the user allows to differ
    measure: Mapping[str, Any] | None = None  # what the held-out scores of this run are of

    @property
    def origin(self) -> str:
        """What the checkpoints of this run remember of the request that began it."""
        return self.request if self.request not in ("auto", "latest", "none") else ""


def check_request(request: str, directory: Path) -> None:
    """Of `train.resume`, before any time is spent on the run.

    Args:
        directory: of the run's checkpoints.

    Raises:
        InputError: it is neither a word that is known nor a directory; or it asks for one of the run's checkpoints, and
            there are none.
    """
    own = request in ("latest", "best") or re.fullmatch(r"step \d+", request)
    if own and not any(path.name.isdigit() for path in directory.glob("*")):
        raise InputError(f"train.resume: {request}, but {directory} holds no complete checkpoint")
    if not own and request not in ("auto", "none") and not Path(request).expanduser().is_dir():
        raise InputError(
            f"train.resume: found {request!r}, which is no directory; expected auto, latest, best, none, `step N` "
            "or the directory of a checkpoint"
        )


def wanted(request: str, where: Path, saved: Sequence[Saved]) -> Saved | Path | None:
    """The checkpoint that is asked for; a path where it belongs to another run; None for a beginning from nothing.

    Args:
        where: the folder of this run's checkpoints.
        saved: those that lie there, oldest first.

    Raises:
        InputError: there is no such checkpoint, or there are some and none should be.
    """
    latest = saved[-1] if saved else None
    if request == "auto":
        return latest
    if request == "none":
        if latest is not None:
            raise InputError(
                f"train.resume: none, but {where} holds a checkpoint of step {latest.step}; give another name= or "
                "output_dir=, or remove the folder"
            )
        return None
    step = re.fullmatch(r"step (\d+)", request)
    if not (step or request in ("latest", "best")):
        path = Path(request).expanduser()
        if latest is None or latest.record["origin"] == request:
            return latest or path
        raise InputError(
            f"train.resume: {request}, but {where} holds step {latest.step} of a run that did not begin there; give "
            "another name= or output_dir="
        )
    if latest is None:
        raise InputError(f"train.resume: {request}, but {where} holds no complete checkpoint")
    if request == "latest" or (latest.record["origin"] == request):
        return latest
    found = {one.step: one for one in saved}
    chosen = best_of(saved) if step is None else found.get(int(step[1]))
    if chosen is None:
        there = "no evaluated one" if request == "best" else f"steps {', '.join(map(str, found))}"
        raise InputError(f"train.resume: {request}, but {where} holds {there}")
    return chosen


def goes_back(request: str, directory: Path) -> bool:
    """Whether the request names an older checkpoint of this run than its newest one, as one process sees them: then the
    run is trained again from there, also where it has ended.

    Args:
        directory: of the run's checkpoints.

    Raises:
        InputError: see `wanted`.
    """
    if request in ("auto", "latest", "none"):
        return False
    saved = read_saved(directory)
    chosen = wanted(request, directory, saved)
    return isinstance(chosen, Saved) and chosen.step < saved[-1].step


def begin(checkpoints: Checkpoints, resume: Resume, abstract: Mapping[str, Any]) -> Begun | None:
    """Loads what the run goes on from; None where it begins from nothing.

    Raises:
        InputError: see `wanted`; the checkpoint is damaged (other than for `auto`), or of other inputs.
    """
    find = _newest_readable if resume.request == "auto" else _asked_for
    begun = find(checkpoints, resume, abstract)
    others = [one.step for one in checkpoints.saved() if one.score is not None and one.measure != resume.measure]
    if others:
        CONSOLE.print(
            f"  the held-out scores of older checkpoints (steps {', '.join(map(str, others))}) measure something else "
            "than evaluate.* asks for now: they are not compared with new ones"
        )
    return begun


def _asked_for(checkpoints: Checkpoints, resume: Resume, abstract: Mapping[str, Any]) -> Begun | None:
    chosen = wanted(resume.request, checkpoints.directory, checkpoints.saved())
    if chosen is None:
        return None
    path = chosen if isinstance(chosen, Path) else checkpoints.path(chosen.step)
    try:
        record = read_record(path) if isinstance(chosen, Path) else chosen.record
        arrays = _load(path, record, resume, abstract)
    except DamagedError as error:
        raise InputError(
            f"{path}: the checkpoint cannot be read ({error}); take another one (train.resume=auto: the newest that "
            "can be)"
        ) from error
    if isinstance(chosen, Saved):
        for newer in [saved.step for saved in checkpoints.saved() if saved.step > chosen.step]:
            aside = checkpoints.set_aside(newer, "superseded")
            CONSOLE.print(f"  the checkpoint of step {newer} is newer than what this run goes on from: kept as {aside}")
    return Begun(arrays, record)


def _newest_readable(checkpoints: Checkpoints, resume: Resume, abstract: Mapping[str, Any]) -> Begun | None:
    damaged = dict(checkpoints.damaged)
    for step, why in sorted(damaged.items()):
        _say_damaged(checkpoints, step, why)
    while (latest := checkpoints.latest) is not None:
        try:
            arrays = _load(checkpoints.path(latest.step), latest.record, resume, abstract)
        except DamagedError as error:
            damaged[latest.step] = str(error)
            _say_damaged(checkpoints, latest.step, str(error))
        else:
            return Begun(arrays, latest.record)
    if damaged:
        raise InputError(
            f"{checkpoints.directory}: no checkpoint can be read; the damaged ones are set aside. To train from "
            "nothing, run the same command again"
        )
    return None


def _say_damaged(checkpoints: Checkpoints, step: int, why: str) -> None:
    aside = checkpoints.set_aside(step, "damaged")
    CONSOLE.print(f"  warning: the checkpoint of step {step} cannot be read ({why}): set aside as {aside}")


def _load(path: Path, record: Mapping[str, Any], resume: Resume, abstract: Mapping[str, Any]) -> dict[str, Any]:
    if (found := record.get("schema", 1)) != SCHEMA:
        raise InputError(
            f"train.resume: {path} holds a train state of schema {found}, this version reads {SCHEMA}; go on with the "
            "version that wrote it, or train anew under another name= (draft.init_from takes its weights over)"
        )
    if differences := same_inputs.differing(record["inputs"], resume.inputs, resume.allowed):
        raise InputError(
            f"train.resume: {path} was made by another configuration ({same_inputs.describe(differences)}). Put it "
            f"back, or give another name=. To go on regardless, add {same_inputs.flags(differences)}."
        )
    target_ids = np.asarray(load(path, {"vocab": None})["vocab"]["target_ids"])
    vocab = resume.vocab
    if not np.array_equal(target_ids, vocab.target_ids_W) or record["vocab"]["source"] != vocab.source:
        raise InputError(
            f"{path}: has another vocabulary map ({len(target_ids)} tokens, chosen from {record['vocab']['source']!r}) "
            f"than this run ({vocab.draft_vocab_size} tokens, {vocab.source!r}); use another output_dir"
        )
    return load(path, abstract)
