"""Checkpoints on Orbax: the only file that imports it.

`checkpoints/STEP/` holds the train state (every process writes its own shards), counters, the draft's vocabulary map, a
fingerprint of every array, and a record: the step, which is also the position in the data, the held-out score and what
it measures, the run's inputs, versions. Orbax writes under a temporary name and renames once all processes are through,
so a directory named by a number is a complete checkpoint. `latest` and `best` beside them are relative links, for
people: what counts is read from the directories.

Saving is asynchronous. Process 0 alone lists, removes and renames; what the others need of it is broadcast.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # raised inside orbax while it is imported
    from orbax.checkpoint import v1 as ocp

from flaxdraft.devices import hosts
from flaxdraft.errors import InputError
from flaxdraft.interfaces import VocabMap
from flaxdraft.train import retention
from flaxdraft.train.retention import Saved

_TEMPORARY = ".orbax-checkpoint-tmp"
_ARRAYS = ("state", "counters")  # what is fingerprinted


class DamagedError(Exception):
    """A checkpoint that cannot be read, or that reads differently from what was written."""


@jax.jit
def fingerprint(tree: Any) -> Any:
    """uint32 of every array: the sum of its words, each times an odd number of its own, modulo 2^32.

    It is the same whatever devices hold the array, and no single flipped bit leaves it as it was.
    """

    def one(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
        word = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
        words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
        place = jnp.zeros((), jnp.uint32)
        for axis, size in enumerate(words.shape):
            place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        return jnp.sum(words * (place * np.uint32(2) + np.uint32(1)), dtype=jnp.uint32)

    return jax.tree.map(one, tree)


def abstract_like(state: Any) -> Any:
    """Shapes, dtypes and places of a state, as restore targets."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _alone() -> ocp.Context:
    """Each process reads for itself: one that fails must not leave the others waiting."""
    own, context = jax.process_index(), ocp.Context()
    context.multiprocessing.primary_host, context.multiprocessing.active_processes = own, {own}
    context.multiprocessing.barrier_sync_key_prefix = f"process{own}"
    return context


@contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs every path on which it tried to read a damaged file; one message of ours is enough."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"record": record, "sha256": hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()}


def read_record(directory: Path) -> dict[str, Any]:
    """What a checkpoint says about itself.

    Raises:
        DamagedError: it cannot be read.
    """
    try:
        with _alone(), _quiet():
            found = ocp.checkpointables_metadata(_address(directory)).custom_metadata
    except Exception as error:  # Orbax raises many kinds
        raise DamagedError(_cause(error)) from error
    record = found.get("record") if isinstance(found, dict) else None
    if not isinstance(record, dict) or found != _sealed(record):
        raise DamagedError("the record of its run is not what was written")
    return record


def _scan(directory: Path) -> tuple[dict[int, Any], dict[int, str]]:
    """Records by step, and why others cannot be read."""
    records, damaged = {}, {}
    for path in directory.glob("*"):
        if path.name.isdigit():
            try:
                records[int(path.name)] = read_record(path)
            except DamagedError as error:
                damaged[int(path.name)] = str(error)
    return records, damaged


def read_saved(directory: Path) -> list[Saved]:
    """The complete checkpoints of a folder, oldest first, as one process sees them; nothing is changed there."""
    records, _ = _scan(directory)
    return [Saved(step, records[step]) for step in sorted(records)]


def load(directory: Path, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays of a checkpoint, placed where the abstract ones say; `state` and `counters` are checked bit by bit.

    Every process reads its own shards; none waits for another, and all learn whether all succeeded.

    Raises:
        DamagedError: in some process it cannot be read, or is not what was written.
    """
    labels = {name: _labels(abstract[name]) for name in _ARRAYS if name in abstract}
    problem, loaded, marks = "", {}, {}
    try:
        with _alone(), _quiet():
            loaded = ocp.load_checkpointables(_address(directory), dict(abstract))
            marks = _read_marks(directory, labels) if labels else {}
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged folder
        problem = _cause(error)
    if not hosts.all_agree(not problem):
        raise DamagedError(problem or "another process cannot read it")
    for name, found in labels.items():
        for label, value in zip(found, jax.tree.leaves(jax.device_get(fingerprint(loaded[name]))), strict=True):
            if int(marks[f"{name}{label}"]) != int(value):
                raise DamagedError(f"{name}{label} is not what was written")
    return loaded


def load_params(directory: Path, abstract: nnx.State) -> tuple[nnx.State, np.ndarray]:
    """What is evaluated and exported of a checkpoint, and no more of it: the parameters (their running mean where one
    is kept), on the first local device, checked bit by bit, and the target ids of the vocabulary map. No other process
    takes part.

    Args:
        directory: of one step.
        abstract: shapes and dtypes of the parameters.

    Raises:
        DamagedError: it cannot be read, or is not what was written.
    """
    averaged = read_record(directory)["inputs"]["train"]["ema_decay"] is not None
    name = "ema" if averaged else "params"
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)
    labels = [f".{name}{label}" for label in _labels(placed)]
    context = _alone()
    context.pytree.loading.partial_load = True
    try:
        with context, _quiet():
            found = ocp.load_checkpointables(_address(directory), {"state": {name: placed}, "vocab": None})
            params = found["state"][name]
            marks = _read_marks(directory, {"state": labels})
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged folder
        raise DamagedError(_cause(error)) from error
    for label, value in zip(labels, jax.tree.leaves(jax.device_get(fingerprint(params))), strict=True):
        if int(marks[f"state{label}"]) != int(value):
            raise DamagedError(f"state{label} is not what was written")
    return params, np.asarray(found["vocab"]["target_ids"])


def _labels(tree: Any) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _read_marks(directory: Path, labels: Mapping[str, list[str]]) -> dict[str, np.ndarray]:
    """Onto the host: the devices that wrote them need not exist any more."""
    number = np.zeros((), np.uint32)
    abstract = {f"{name}{label}": number for name, found in labels.items() for label in found}
    context = _alone()
    context.pytree.loading.partial_load = True
    with context:
        return ocp.load_checkpointables(_address(directory), {"fingerprint": abstract})["fingerprint"]


def _address(directory: Path) -> str:
    """As Orbax takes it, whose types know texts and paths of its own kind alone."""
    return str(directory.resolve())


def _cause(error: BaseException) -> str:
    """The first line of the error that an error came from."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def _is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that there is no room."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(text in str(error) for text in ("No space left", "Disk quota exceeded", "File too large")):
            return True
        error = error.__cause__ or error.__context__
    return False


class Checkpoints:
    """The checkpoints of one run; use it as a context manager, so that the last save is finished on the way out."""

    def __init__(self, directory: Path, *, keep_latest: int = 2, keep_every: int | None = None):
        self.directory = directory
        self._keep_latest, self._keep_every = keep_latest, keep_every
        self._saving: tuple[Saved, Any] | None = None
        found = None
        if hosts.is_main():
            directory.mkdir(parents=True, exist_ok=True)
            for left in directory.glob(f"*{_TEMPORARY}*"):  # of a save that was killed
                shutil.rmtree(left, ignore_errors=True)
            found = _scan(directory)
        records, damaged = hosts.agree(found)
        self._saved = {int(step): Saved(int(step), record) for step, record in records.items()}
        self.damaged = {int(step): why for step, why in damaged.items()}  # why a step is not among the saved ones
        self._link()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None:
            self.finish()

    def saved(self) -> list[Saved]:
        """Complete checkpoints, oldest first."""
        return [self._saved[step] for step in sorted(self._saved)]

    def path(self, step: int) -> Path:
        return self.directory / str(step)

    @property
    def latest(self) -> Saved | None:
        return self._saved[max(self._saved)] if self._saved else None

    @property
    def best(self) -> Saved | None:
        return retention.best_of(self._saved.values())

    def best_score(self, measure: Mapping[str, Any] | None) -> float:
        """Of all checkpoints whose score is of that measure, the one under way included."""
        under_way = [self._saving[0]] if self._saving else []
        scores = [one.score for one in [*self.saved(), *under_way] if one.measure == measure and one.score is not None]
        return max(scores, default=-math.inf)

    def save(self, step: int, arrays: Mapping[str, Any], vocab: VocabMap, record: Mapping[str, Any]) -> None:
        """Starts an asynchronous save; waits for the one before it.

        Args:
            arrays: `state` and `counters`.
            record: facts for JSON; `score`, `measure` and `inputs` among them.

        Raises:
            InputError: the save before it failed.
        """
        self.finish()
        if step in self._saved:
            return
        saved = Saved(step, {**record, "step": step})
        marks = {
            f"{name}{label}": mark
            for name in _ARRAYS
            for label, mark in zip(_labels(arrays[name]), jax.tree.leaves(fingerprint(arrays[name])), strict=True)
        }
        items = {**arrays, "fingerprint": marks, "vocab": {"target_ids": vocab.target_ids_W.astype(np.int64)}}
        context = ocp.Context()
        # Copies of an array share the writing of it; below this size cutting it up costs more than it saves.
        context.array.saving.min_slice_bytes_for_replica_parallel = 1 << 20
        try:
            with context:
                response = ocp.save_checkpointables_async(
                    _address(self.path(step)), items, custom_metadata=_sealed(saved.record)
                )
        except Exception as error:
            raise self._failed(step, error) from error
        self._saving = (saved, response)

    def poll(self) -> None:
        """Looks, without waiting, whether the save under way is through.

        Raises:
            InputError: it failed.
        """
        self._settle(0.0)

    def finish(self) -> None:
        """Waits for the save under way.

        Raises:
            InputError: it failed.
        """
        self._settle(None)

    def _settle(self, timeout: float | None) -> None:
        if self._saving is None:
            return
        saved, response = self._saving
        try:
            response.result(timeout)
        except Exception as error:
            if timeout is not None and isinstance(error, TimeoutError):
                return  # not through yet; without a timeout it is the save itself that gave up
            self._saving = None
            raise self._failed(saved.step, error) from error
        self._saving = None
        self._saved[saved.step] = saved
        stay = retention.kept(retention.competing(self._saved.values()), self._keep_latest, self._keep_every)
        for step in set(self._saved) - stay:
            del self._saved[step]
            self._remove(step)
        self._link()

    def _remove(self, step: int) -> None:
        """Out of the numbered ones first, then away: what is removed half is no checkpoint any more."""
        if hosts.is_main():
            doomed = self.directory / f"{step}{_TEMPORARY}-removed"
            os.replace(self.path(step), doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _link(self) -> None:
        if not hosts.is_main():
            return
        for name, saved in (("latest", self.latest), ("best", self.best)):
            link, temporary = self.directory / name, self.directory / f".{name}.tmp"
            if saved is None:
                link.unlink(missing_ok=True)
                continue
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(str(saved.step))
            if link.is_dir() and not link.is_symlink():  # a copy of the run that followed its links
                shutil.rmtree(link)
            os.replace(temporary, link)

    def set_aside(self, step: int, why: str) -> Path:
        """Takes a checkpoint out of the numbered ones and keeps it as STEP.why; returns where."""
        aside = self.directory / f"{step}.{why}"
        self._saved.pop(step, None)
        if hosts.is_main():
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(self.path(step), aside)
        self._link()
        return aside

    def _failed(self, step: int, error: Exception) -> InputError:
        logging.getLogger(__name__).exception("saving step %d", step)
        if hosts.is_main():
            for left in self.directory.glob(f"*{_TEMPORARY}*"):
                shutil.rmtree(left, ignore_errors=True)
        cause = "the disk is full" if _is_full(error) else _cause(error)
        last = self.latest
        stands = f"the checkpoint of step {last.step} is complete" if last else "there is no earlier one"
        return InputError(
            f"{self.path(step)}: the checkpoint could not be written ({cause}); {stands}. Make room, then run the "
            "same command again: it goes on from there"
        )
