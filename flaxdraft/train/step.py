"""The optimizer step: pure, donated, compiled once for each batch shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from flaxdraft.interfaces import Algorithm, Example, LossSums
from flaxdraft.train.state import TrainState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    loss: jax.Array
    grad_norm: jax.Array
    sums: LossSums


def make_train_step(
    graphdef: nnx.GraphDef, algorithm: Algorithm, tx: optax.GradientTransformation
) -> Callable[[TrainState, nnx.State, Example], tuple[TrainState, StepMetrics]]:
    """step(state, frozen, example) -> state, metrics; the state is donated."""

    def loss_fn(params, frozen, example):
        sums = algorithm.loss_sums(nnx.merge(graphdef, params, frozen), example)
        return algorithm.mean_loss(sums), sums

    def train_step(state: TrainState, frozen: nnx.State, example: Example) -> tuple[TrainState, StepMetrics]:
        example = dataclasses.replace(example, accepted_J=state.accepted_J)
        (loss, sums), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, frozen, example)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = StepMetrics(loss, optax.tree.norm(grads), sums)
        mean_J = sums.expected_accept_J / jnp.maximum(sums.row_count_J, 1)
        accepted_J = jnp.where(sums.row_count_J > 0, mean_J, state.accepted_J)
        return TrainState(state.step + 1, params, opt_state, accepted_J), metrics

    return jax.jit(train_step, donate_argnames="state")
