"""The optimizer step: pure, donated, compiled once for each batch shape.

A step goes through its global batch in micro-batches and adds up numerators, counts and gradients; the one division
comes last, so that the number of micro-batches does not show in the result. Every matrix is brought together over the
devices once, in the precision of the products, before the first micro-batch; its gradient stays in each device's own
part ("unreduced") until after the last one, and is then reduced once, in float32, to where the matrix lives. Vectors
are small: theirs are reduced as they come.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import P

from flaxdraft.devices.sharding import axes_of, spec_of
from flaxdraft.interfaces import Algorithm, Example, Sums
from flaxdraft.train.state import TrainState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    loss: jax.Array
    grad_norm: jax.Array
    sums: Sums
    skipped: jax.Array  # see `TrainState`


def _in_parts(x: jax.Array, num: int) -> jax.Array:
    """[B, ...] -> [num, B / num, ...]; each part is spread over the devices that held the whole, and nothing moves."""
    batch, *rest = spec_of(x).partitions
    spec = P(batch, None, *rest) if batch is not None else None
    return jnp.moveaxis(jnp.reshape(x, (x.shape[0] // num, num, *x.shape[1:]), out_sharding=spec), 1, 0)


def _together(x: jax.Array, axes: frozenset[str], *, trained: bool) -> jax.Array:
    """A matrix put together along `axes`; the gradient of a trained one is unreduced over them."""
    if not axes:
        return x
    kept = (None if axis in axes else axis for axis in spec_of(x).partitions)
    # JAX lowers no unreduced loop result on a mesh of one device.
    unreduced = trained and jax.sharding.get_abstract_mesh().size > 1
    return jax.reshard(x, P(*kept, reduced=axes if unreduced else frozenset()))


def _as_read(param: jax.Array, compute: Any, axes: frozenset[str]) -> jax.Array:
    """A parameter as products read it: matrices narrow and together."""
    if param.ndim < 2:
        return param
    narrow = jnp.finfo(compute).bits < jnp.finfo(param.dtype).bits
    return _together(param.astype(compute) if narrow else param, axes, trained=True)


def _no_gradient(param: jax.Array, work: jax.Array) -> jax.Array:
    """The empty sum of gradients to `work`, as wide as the master weights."""
    zeros, spec = jnp.zeros_like(param), spec_of(work)
    return jax.reshard(zeros, P(*spec.partitions, unreduced=spec.reduced)) if spec.reduced else zeros


def _reduced(gradient: jax.Array, param: jax.Array) -> jax.Array:
    """The one reduction: a gradient summed over devices, to where its parameter lives."""
    return jax.reshard(gradient, spec_of(param)) if spec_of(gradient).unreduced else gradient


def summed_gradients(
    terms: Callable[[nnx.State, Example], tuple[jax.Array, Sums]],
    params: nnx.State,
    example: Example,
    num: int,
    compute: Any,
) -> tuple[Sums, nnx.State]:
    """The sums over `num` micro-batches of the example, and the gradient of their numerators, where parameters live.

    Args:
        terms: numerator and sums of one micro-batch.
        compute: the precision in which products read matrices.
    """
    moving = example.batch, example.features, example.chosen
    axes = frozenset().union(*(axes_of(spec_of(x).partitions[:2]) for x in jax.tree.leaves(moving)))
    work = jax.tree.map(lambda p: _as_read(p, compute, axes), params)
    teacher = jax.tree.map(lambda x: _together(x, axes, trained=False), example.teacher)

    def one(batch, features, chosen):
        part = Example(batch, features, chosen, teacher)
        # Widened again for the sake of the gradients: what every use of a matrix adds is summed in its master's
        # precision. XLA drops the pair of conversions, but where the backward pass makes something again.
        wide = jax.tree.map(lambda w, p: w.astype(p.dtype), work, params)
        (_, sums), gradients = jax.value_and_grad(terms, has_aux=True)(wide, part)
        return sums, gradients

    if num == 1:
        sums, gradients = one(*moving)
    else:
        parts = jax.tree.map(lambda x: _in_parts(x, num), moving)
        first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=_without_first(x)), parts)
        sums_of = lambda batch, features, chosen: terms(params, Example(batch, features, chosen, teacher))[1]  # noqa: E731
        sums_like = jax.eval_shape(sums_of, *first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums_like)
        empty = zeros, jax.tree.map(_no_gradient, params, work)
        add = lambda carry, part: (jax.tree.map(jnp.add, carry, one(*part)), None)  # noqa: E731
        (sums, gradients), _ = jax.lax.scan(add, empty, parts)
    return sums, jax.tree.map(_reduced, gradients, params)


def _without_first(x: jax.Array) -> jax.NamedSharding | None:
    """Where one of the parts of an array lies."""
    sharding = jax.typeof(x).sharding
    return None if sharding.mesh.empty else sharding.update(spec=P(*sharding.spec.partitions[1:]))


def make_train_step(
    graphdef: nnx.GraphDef,
    algorithm: Algorithm,
    tx: optax.GradientTransformation,
    compute: Any,
    num_microbatches: int = 1,
    ema_decay: float | None = None,
) -> jax.stages.Wrapped:
    """step(state, frozen, example) -> state, metrics; compiled, and the state is donated.

    A loss or gradient that is not finite leaves all but the counts of steps as it was.

    Args:
        compute: the precision in which products read matrices.
        num_microbatches: it divides the rows of the batch on each device.
        ema_decay: of the running mean of the parameters, which the state then holds; see `init_state`.
    """

    def train_step(state: TrainState, frozen: nnx.State, example: Example) -> tuple[TrainState, StepMetrics]:
        def terms(params, part):
            sums = algorithm.sums(nnx.merge(graphdef, params, frozen), part, state.carry)
            return sums.terms()[0], sums

        sums, gradients = summed_gradients(terms, state.params, example, num_microbatches, compute)
        numerator, count = sums.terms()
        gradients = jax.tree.map(lambda g: g / count, gradients)
        loss, norm = numerator / count, optax.tree.norm(gradients)

        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        mean = state.ema
        if (decay := ema_decay) is not None:
            mean = jax.tree.map(lambda m, p: decay * m + (1 - decay) * p, mean, params)
        new = params, opt_state, algorithm.next_carry(state.carry, sums, state.step), mean
        old = state.params, state.opt_state, state.carry, state.ema
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        params, opt_state, carry, mean = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        skipped = state.skipped + ~finite
        state = TrainState(state.step + 1, params, opt_state, carry, skipped, mean)
        return state, StepMetrics(loss, norm, sums, skipped)

    return jax.jit(train_step, donate_argnames="state")
