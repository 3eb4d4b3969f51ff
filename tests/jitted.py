"""The unroll and the sums, compiled: one compile is cheaper than a thousand eager operations."""

from functools import partial

import jax
from flax import nnx

from flaxdraft.algorithms.eagle3 import objective


@partial(jax.jit, static_argnames=("graphdef", "num_steps"))
def _unroll(graphdef, state, batch, taps_BTKE, rows_BR, num_steps):
    chosen = objective.ChosenRows(rows_BR)
    return objective.unroll(nnx.merge(graphdef, state), batch, taps_BTKE, chosen, num_steps)


@partial(jax.jit, static_argnames=("graphdef", "algorithm"))
def _loss_sums(graphdef, state, algorithm, example):
    return algorithm.sums(nnx.merge(graphdef, state), example, algorithm.first_carry())


def unroll(draft, batch, taps_BTKE, rows_BR, num_steps):
    return _unroll(*nnx.split(draft), batch, taps_BTKE, rows_BR, num_steps)


def loss_sums(algorithm, draft, example):
    return _loss_sums(*nnx.split(draft), algorithm, example)
