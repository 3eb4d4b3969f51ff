"""A draft from disk next to its target, with everything checked that would otherwise show as a low accept length."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdraft.decode.decoding import ReadyDraft
from flaxdraft.devices.sharding import Sharding
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Algorithm, VocabMap
from flaxdraft.nn.layers import Frozen
from flaxdraft.nn.precision import Precision
from flaxdraft.serving.trained_draft import TrainedDraft
from flaxdraft.targets import LoadedTarget
from flaxdraft.targets.embedding_and_head import EmbeddingAndHeadWeights


@dataclasses.dataclass(frozen=True)
class PairedDraft:
    """A draft beside its target, on one device."""

    algorithm: Algorithm
    graphdef: nnx.GraphDef
    params: nnx.State
    frozen: nnx.State
    vocab: VocabMap

    @property
    def ready(self) -> ReadyDraft:
        """As decoding takes it."""
        draft = nnx.merge(self.graphdef, self.params, self.frozen)
        return ReadyDraft(*nnx.split(draft), self.algorithm.drafter())


def check_finite(state: nnx.State, origin: str) -> None:
    """
    Raises:
        InputError: a weight holds NaN or infinity.
    """
    for path, variable in nnx.to_flat_state(state):
        if not jnp.isfinite(variable[...]).all():
            name = "/".join(map(str, path))
            raise InputError(
                f"{origin}: {name} holds values that are not finite; the file was damaged, or training diverged"
            )


def pair(directory: Path, loaded: TrainedDraft, target: LoadedTarget, precision: Precision) -> PairedDraft:
    """
    Args:
        directory: where the draft was read.

    Raises:
        InputError: a weight is not finite, or the draft was made for a target of another vocabulary or width.
    """
    c = target.model.config
    for name, theirs, ours in (
        ("vocab_size", loaded.config.vocab_size, c.vocab_size),
        ("target_hidden_size", loaded.config.target_hidden_size, c.hidden_size),
    ):
        if theirs != ours:
            raise InputError(
                f"draft {directory}: its {name} is {theirs}, that of the target {target.path} is {ours}; the draft was "
                "made for another target"
            )
    check_finite(loaded.params, f"draft {directory}")
    with target.model.on_mesh():
        check_finite(target.model.state, f"target {target.path}")
    embedding_and_head = EmbeddingAndHeadWeights.of_loaded(target.model)
    draft = loaded.module.make(
        loaded.config, loaded.vocab, embedding_and_head, precision=precision, sharding=Sharding.none(), rngs=nnx.Rngs(0)
    )  # fmt: skip
    nnx.update(draft, jax.tree.map(lambda x: x.astype(precision.param), loaded.params))
    graphdef, params, frozen = nnx.split(draft, nnx.Param, Frozen)
    return PairedDraft(loaded.algorithm, graphdef, params, frozen, loaded.vocab)
