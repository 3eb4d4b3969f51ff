"""What training carries from step to step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from flaxdraft.interfaces import Algorithm
from flaxdraft.nn.layers import Frozen

SCHEMA = 2  # of the state in checkpoints; 1 knew one algorithm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    step: jax.Array
    params: nnx.State  # float32 masters
    opt_state: optax.OptState
    carry: Any  # the algorithm's own (`Algorithm.first_carry`)
    skipped: jax.Array  # steps whose loss or gradient was not finite: they changed nothing but this and `step`
    ema: nnx.State | None = None  # the running mean of the parameters, where one is kept


def split_draft(draft: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Structure, trained parameters, and what travels along untrained (embedding of the target, vocabulary)."""
    graphdef, params, frozen = nnx.split(draft, nnx.Param, Frozen)
    return graphdef, params, frozen


def init_state(
    params: nnx.State, tx: optax.GradientTransformation, algorithm: Algorithm, *, ema: bool = False
) -> TrainState:
    """Before the first step. Under jit on a mesh, moments and running mean lie where their parameters do.

    Args:
        ema: whether a running mean of the parameters is kept.
    """
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)  # two buffers: the state is donated
    mean = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(step, params, tx.init(params), algorithm.first_carry(), skipped, mean)


def evaluation_params(state: TrainState) -> nnx.State:
    """The parameters to evaluate and export: their running mean where one is kept."""
    return state.params if state.ema is None else state.ema
