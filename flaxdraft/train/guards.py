"""What ends a run before its last step, and how: a notice of preemption, a run of broken steps, too little memory."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from flaxdraft.data.pipeline import Pipeline
from flaxdraft.errors import InputError
from flaxdraft.train.resident import Resident


class PreemptedError(Exception):
    """The run was asked to stop; its state is saved. Launchers start it again on `peers.RESTART`."""


class Preemption:
    """SIGTERM as a request: the step under way is finished and saved. Of many processes all stop after the same step,
    whichever was told (JAX passes the notice on)."""

    def __init__(self) -> None:
        self._told = False

    def __enter__(self) -> Preemption:
        if jax.process_count() == 1:  # else JAX has the signal
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *signal_and_frame: object) -> None:
        self._told = True

    def due(self, step: int) -> bool:
        """Whether to save and stop after this step; to be asked after every one."""
        if jax.process_count() == 1:
            return self._told
        return multihost_utils.reached_preemption_sync_point(step)


class BrokenSteps:
    """Counts steps whose loss or gradient was not finite; too many in a row end the run."""

    def __init__(self, limit: int):
        self._limit, self._run = limit, 0

    def note(self, step: int, loss: np.ndarray, grad_norm: np.ndarray, pipeline: Pipeline) -> None:
        """
        Raises:
            InputError: this step (counted from 0) is the last of too many in a row; the rows of its batch are named.
        """
        if np.isfinite(loss) and np.isfinite(grad_norm):
            self._run = 0
            return
        self._run += 1
        if self._run < self._limit:
            return
        raise InputError(
            f"train: loss {loss} and gradient norm {grad_norm} at step {step + 1}, the last of {self._run} steps in a "
            f"row that are not finite and were skipped (train.max_skipped); {describe_rows(pipeline, step)}. Look at "
            "these documents, or lower train.learning_rate"
        )


def describe_rows(pipeline: Pipeline, step: int) -> str:
    """The documents of a step's batch; those whose features are not finite first, if there are any."""
    documents = pipeline.layout.rows(step).documents
    host = pipeline.batch(step)
    listed = f"its rows hold documents {_rows(documents, range(len(documents)))}"
    if host.features is None:
        return listed
    arrays = [np.asarray(x, np.float32) for x in jax.tree.leaves(host.features)]
    broken = [at for at in range(len(host.batch.tokens_BT)) if not all(np.isfinite(x[at]).all() for x in arrays)]
    first = pipeline.part[0] * len(host.batch.tokens_BT)
    if not broken:
        return listed
    return f"features that are not finite are in documents {_rows(documents, [first + at for at in broken])}; {listed}"


def _rows(documents: Sequence[np.ndarray], rows: Sequence[int]) -> str:
    return ", ".join(f"{'+'.join(map(str, documents[row]))} (row {row})" for row in rows if row < len(documents))


@contextmanager
def memory_advice(directory: Path, resident: Resident) -> Iterator[None]:
    """
    Raises:
        InputError: the device ran out of memory within; says what it holds and what to change. A profile is saved.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Out of memory" not in str(error):
            raise
        profile = directory / "memory.prof"
        jax.profiler.save_device_memory_profile(profile)
        said = str(error)
        raise InputError(
            f"train: the device is out of memory ({said.splitlines()[0][:200]}); {resident.describe(said)}. "
            "What helps besides: train.accumulate, algorithm.remat=full, a lower algorithm.loss_chunk, weights over "
            "more devices (mesh.fsdp), a lower train.batch_size, shorter rows. --plan prints what a configuration "
            f"takes without running it. All that was held is in {profile} (pprof -top {profile})"
        ) from error
