"""What training carries from step to step, and how a draft begins."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from flaxdraft.algorithms.eagle3.draft import Eagle3Draft
from flaxdraft.interfaces import Target, VocabMap
from flaxdraft.nn.layers import Frozen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    step: jax.Array
    params: nnx.State  # float32 masters
    opt_state: optax.OptState
    accepted_J: jax.Array  # mean expected acceptance of each unroll step over the last global batch
    skipped: jax.Array  # steps whose loss or gradient was not finite: they changed nothing but this and `step`
    ema: nnx.State | None = None  # the running mean of the parameters, where one is kept


def split_draft(draft: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Structure, trained parameters, and what travels along untrained (embedding of the target, vocabulary)."""
    return nnx.split(draft, nnx.Param, Frozen)


def init_state(params: nnx.State, tx: optax.GradientTransformation, num_steps: int, *, ema: bool = False) -> TrainState:
    """Before the first step of an algorithm with `num_steps` unroll steps. Under jit on a mesh, moments and running
    mean lie where their parameters do.

    Args:
        ema: whether a running mean of the parameters is kept.
    """
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)  # two buffers: the state is donated
    mean = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(step, params, tx.init(params), jnp.zeros(num_steps), skipped, mean)


def evaluation_params(state: TrainState) -> nnx.State:
    """The parameters to evaluate and export: their running mean where one is kept."""
    return state.params if state.ema is None else state.ema


def warm_start(draft: Eagle3Draft, target: Target, vocab: VocabMap) -> None:
    """Begins where the target ends, in place: the head's rows and the final norm are the target's, and fc passes the
    highest tapped state on. The first hidden states then lie in the space that the head reads.

    Only where draft and target widths are equal.
    """
    width = target.config.hidden_size
    draft.lm_head.kernel[...] = target.head()[vocab.target_ids_W].T.astype(draft.lm_head.kernel.dtype)
    draft.norm.scale[...] = target.final_norm().astype(draft.norm.scale.dtype)
    kernel = draft.fc.kernel[...]
    draft.fc.kernel[...] = kernel.at[2 * width :].add(jnp.eye(width, dtype=kernel.dtype))
