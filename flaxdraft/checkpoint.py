"""Checkpoints on Orbax: the only file that imports it.

A checkpoint holds the train state (parameters, moments, step), and the draft's vocabulary map beside them. Orbax
writes under a temporary name and renames, so only complete checkpoints are ever seen.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # raised inside orbax while it is imported
    from orbax.checkpoint import v1 as ocp

from flaxdraft.errors import InputError
from flaxdraft.interfaces import VocabMap


class Checkpoints:
    """The checkpoints of one run; use it as a context manager, so that the last save is finished on the way out."""

    def __init__(self, directory: Path, *, every: int = 1, keep: int = 2):
        policies = ocp.training
        self._inner = policies.Checkpointer(
            directory.resolve(),
            save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(every),
            preservation_policy=policies.preservation_policies.LatestN(keep),
        )
        self._directory = directory

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        self._inner.close()

    def latest_step(self) -> int | None:
        latest = self._inner.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: Any, vocab: VocabMap, *, force: bool = False) -> None:
        """Starts an asynchronous save if one is due at this step."""
        if force and self.latest_step() == step:
            return
        items = {"state": state, "vocab": {"target_ids": vocab.target_ids_W.astype(np.int64)}}
        self._inner.save_checkpointables_async(
            step, items, force=force, custom_metadata={"vocab_size": vocab.vocab_size}
        )

    def restore(self, abstract_state: Any, vocab: VocabMap) -> Any:
        """The newest state, placed where the abstract one says.

        Raises:
            InputError: the checkpoint is damaged, or belongs to another vocabulary map.
        """
        step = self.latest_step()
        saved = self._load(step, "vocab", None)["target_ids"]
        if not np.array_equal(np.asarray(saved), vocab.target_ids_W):
            raise InputError(
                f"{self._directory}: the checkpoint of step {step} has another vocabulary map "
                f"({len(saved)} tokens) than this run ({vocab.draft_vocab_size}); use another output_dir"
            )
        return self._load(step, "state", abstract_state)

    def _load(self, step: int, name: str, abstract: Any) -> Any:
        try:
            return self._inner.load_checkpointables(step, {name: abstract})[name]
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged folder
            raise InputError(
                f"{self._directory / str(step)}: the checkpoint cannot be read ({str(error).splitlines()[0][:200]}); "
                "remove it and run again, from the one before it"
            ) from error


def abstract_like(state: Any) -> Any:
    """Shapes, dtypes and places of a state, as restore targets."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def load_params(directory: Path, abstract: nnx.State) -> tuple[nnx.State, np.ndarray]:
    """The parameters of one checkpoint, on the first local device, and the target ids of its vocabulary map; optimizer
    and the rest are not read.

    Args:
        directory: of one step.
        abstract: shapes and dtypes of the parameters.

    Raises:
        InputError: it is damaged or of another draft.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)
    part = ocp.Context()
    part.pytree.loading.partial_load = True
    try:
        with part:
            params = ocp.load_checkpointables(directory.resolve(), {"state": {"params": placed}})["state"]["params"]
        vocab = ocp.load_checkpointables(directory.resolve(), {"vocab": None})["vocab"]
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged folder
        raise InputError(
            f"{directory}: its parameters cannot be read ({str(error).splitlines()[0][:200]}); take another checkpoint"
        ) from error
    return params, np.asarray(vocab["target_ids"])
