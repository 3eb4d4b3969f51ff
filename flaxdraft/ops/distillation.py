"""Distillation in chunks of rows: teacher logits, draft logits, losses, metrics and gradients, all inside one chunk.

Logits never feed a recurrence, so all steps run first and the rows are walked afterwards. Supervised rows are
compacted on each device and the loop runs ceil(n / chunk) times; neither [rows, V] nor [rows, W] is ever held for all
rows. The gradient is made in the same walk, with one float32 accumulator for the head. Where the head is split by
vocabulary, each device makes the logits of its part, and numbers that run over the vocabulary are put together
(ops/vocabulary_axis.py).

Shape letters: B batch, R rows, M = B R, J steps, D draft width, E target width, W draft vocabulary, C
rows of a chunk, S = C + J - 1 rows with their teachers: the teacher of row r at step j is the teacher of row r + j at
step 0, since supervision asks rows r..r+j to be consecutive and each supervised by some step. Q = C J
rows of all steps of a chunk, row by row: neighbours have nearly the same teachers, which a GPU then reads from memory
once.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from flaxdraft.devices.per_device import added_up, per_device, scaled
from flaxdraft.devices.sharding import axes_of, gradient_spec, partitions_of, spec_of
from flaxdraft.ops.objectives import TeacherRows
from flaxdraft.ops.row_signals import row_signals
from flaxdraft.ops.step_sums import StepSums
from flaxdraft.ops.vocabulary_axis import logsumexp

# In all of a run's shapes the products are as fast as with longer chunks; see experiments/bench_step.py.
DEFAULT_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class DistillOptions:
    """What stays the same from call to call."""

    step_weights: tuple[float, ...]  # of the J steps in the loss
    objective: str = "soft_cross_entropy"  # a name of ops/objectives.py
    chunk: int = DEFAULT_CHUNK


class TeacherStates(NamedTuple):
    """The target at step 0 of each row, before its head."""

    last_BRE: Float[Array, "B R E"]
    logsumexp_BR: Float[Array, "B R"]  # over the full vocabulary
    draft_argmax_BR: Int[Array, "B R"]  # draft id of the full-vocabulary argmax, -1 outside the draft vocabulary


class _Heads(NamedTuple):
    """What makes logits of the two models' states, for one part of the vocabulary or all of it."""

    draft_DW: Float[Array, "D W"]
    teacher_WE: Float[Array, "W E"]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def distill(
    plan: DistillOptions,
    states: tuple[Float[Array, "B R D"], ...],
    head_DW: Float[Array, "D W"],
    teacher: TeacherStates,
    teacher_head_WE: Float[Array, "W E"],
    supervised_JBR: Bool[Array, "J B R"],
    accepted_J: Float[Array, " J"],
) -> tuple[StepSums, Bool[Array, "B R J"]]:
    """The sums of all rows, and which rows the draft hits at each step.

    Only `loss_J` has a gradient (to `states` and `head_DW`), and only through its sum weighted by `plan.step_weights`,
    which is all that a loss needs of it: the walk makes the gradient of that sum alone. Any other combination of
    loss_J gives NaN.

    Args:
        states: the head's input of each step, in the precision of the products.
        teacher_head_WE: the rows of the target's head that the draft vocabulary has.
        head_DW: master weights; their gradient is as wide, and unreduced over the axes that their type calls reduced.
        accepted_J: see `objectives.lk_lambda`.
    """
    return _walk(plan, False, states, head_DW, teacher, teacher_head_WE, supervised_JBR, accepted_J)[0]


def _walk(plan, want_gradients, states, head_DW, teacher, teacher_head_WE, supervised_JBR, accepted_J):
    rows_spec, head_spec = spec_of(states[0]).partitions[:2], spec_of(head_DW)
    rows_axes, vocabulary = axes_of(rows_spec), partitions_of(head_spec)[1]
    if vocabulary is not None:
        teacher_head_WE = jax.reshard(teacher_head_WE, jax.P(vocabulary, None))

    def local(*args):
        (hit_BRJ, gradients), (sums, head_gradient) = _walk_shard(plan, want_gradients, vocabulary, *args)
        sums = jax.tree.map(lambda x: added_up(x, jax.P(), rows_axes), sums)
        if want_gradients:
            gradients = jax.tree.map(lambda x: x if vocabulary is None else lax.psum(x, vocabulary), gradients)
            head_gradient = added_up(head_gradient, head_spec, rows_axes)
        return (hit_BRJ, gradients), (sums, head_gradient)

    out = (jax.P(*rows_spec), jax.tree.map(spec_of, states) if want_gradients else ())
    out_specs = out, (jax.P(), gradient_spec(head_DW) if want_gradients else ())
    heads = _Heads(head_DW, teacher_head_WE)
    args = states, teacher, jnp.moveaxis(supervised_JBR, 0, -1), heads, accepted_J
    (hit_BRJ, gradients), (sums, head_gradient) = per_device(local, out_specs, *args)
    return (sums, hit_BRJ), (gradients, head_gradient)


def _walk_shard(plan, want_gradients, axis, states, teacher, supervised_BRJ, heads: _Heads, accepted_J):
    num_steps, (num_batch, num_rows) = len(states), states[0].shape[:2]
    total, size = num_batch * num_rows, plan.chunk
    # Supervised rows, and the rows behind them that bring the teachers of their later steps, supervised here or not.
    later = [_later(jnp.any(supervised_BRJ[..., j:], axis=-1), j) for j in range(num_steps)]
    active_BR = jnp.any(jnp.stack(later), axis=0)
    flat = lambda x: x.reshape(total, *x.shape[2:])  # noqa: E731
    states, teacher, supervised_MJ = jax.tree.map(flat, (states, teacher, supervised_BRJ))
    head = heads.draft_DW.astype(states[0].dtype)  # the master weights are wider
    wide = jnp.promote_types(states[0].dtype, jnp.float32)
    # Active rows first, in their order; what fills the last chunk lies past the end, and reads 0.
    active_M = active_BR.ravel()
    order, count = jnp.argsort(~active_M, stable=True), jnp.sum(active_M)
    order = jnp.where(jnp.arange(total) < count, order, total)
    order = jnp.pad(order, (0, size + num_steps - 1), constant_values=total)
    take = lambda x, at: x.at[at].get(mode="fill", fill_value=0)  # noqa: E731

    def chunk(i, carry):
        sums, hit_MJ, gradients, head_gradient = carry
        at_S = lax.dynamic_slice_in_dim(order, i * size, size + num_steps - 1)
        at_C = at_S[:size]
        last_SE, logsumexp_S, argmax_S = jax.tree.map(lambda x: take(x, at_S), teacher)
        teacher_SW = jnp.einsum("se,we->sw", last_SE, heads.teacher_WE, preferred_element_type=wide)
        at_Q = (jnp.arange(size)[:, None] + jnp.arange(num_steps)[None]).ravel()
        spread = lambda x_S: x_S.at[at_Q].get(mode="promise_in_bounds")  # noqa: E731
        statistics = logsumexp(teacher_SW, axis), logsumexp_S, argmax_S
        rows = TeacherRows(*map(spread, (teacher_SW, *statistics)), axis=axis)
        supervised_Q = take(supervised_MJ, at_C).ravel()
        in_draft_Q = supervised_Q & (rows.draft_argmax_C >= 0)
        # All steps in one product: its gradient to the head is then one product too, not J to be added up.
        state_QD = jnp.stack([take(x, at_C) for x in states], axis=1).reshape(size * num_steps, -1)
        logits_QW = jnp.einsum("qd,dw->qw", state_QD, head, preferred_element_type=wide)
        weight_Q = jnp.tile(jnp.asarray(plan.step_weights, wide), size)
        weight_Q = jnp.where(in_draft_Q, weight_Q, 0.0) if want_gradients else None
        signals = row_signals(plan.objective, logits_QW, rows, jnp.tile(accepted_J, size), weight_Q)
        if want_gradients:
            # An unsupervised row may hold anything: nothing of it may reach the head.
            assert signals.slope_QW is not None
            slope_QW = jnp.where(in_draft_Q[:, None], signals.slope_QW, 0.0).astype(head.dtype)
            state_QD = jnp.where(in_draft_Q[:, None], state_QD, 0)
            back_QD = jnp.einsum("qw,dw->qd", slope_QW, head, preferred_element_type=wide).astype(head.dtype)
            back_CJD = back_QD.reshape(size, num_steps, -1)
            place = partial(lax.dynamic_update_slice_in_dim, start_index=i * size, axis=0)
            gradients = tuple(place(x, back_CJD[:, j]) for j, x in enumerate(gradients))
            head_gradient += jnp.einsum("qd,qw->dw", state_QD, slope_QW, preferred_element_type=wide)
        apart = lambda x_Q: x_Q.reshape(size, num_steps)  # noqa: E731
        hit_CJ = apart(in_draft_Q & signals.hit_Q)
        masks = apart(in_draft_Q), apart(supervised_Q), hit_CJ, jnp.cumprod(hit_CJ, axis=1, dtype=jnp.int32)
        counts = (jnp.sum(x, axis=0, dtype=jnp.int32) for x in masks)
        loss_J = jnp.sum(apart(jnp.where(in_draft_Q, signals.loss_Q, 0.0)), axis=0)
        accept_J = jnp.sum(apart(jnp.where(supervised_Q, signals.accept_Q, 0.0)), axis=0)
        hit_MJ = hit_MJ.at[at_C].set(hit_CJ, mode="drop")
        return (
            sums + StepSums(loss_J, *counts, expected_accept_J=accept_J, step_weights=plan.step_weights),
            hit_MJ,
            gradients,
            head_gradient,
        )

    zeros = jnp.zeros(num_steps, wide)
    none = jnp.zeros(num_steps, jnp.int32)
    empty = StepSums(zeros, none, none, none, none, zeros, plan.step_weights), jnp.zeros((total, num_steps), bool)
    # Gradients of states in the order of the walk, with room for the last chunk to be whole.
    walked = tuple(jnp.zeros((total + size, x.shape[1]), x.dtype) for x in states)
    slots = (walked, jnp.zeros(head.shape, wide)) if want_gradients else ((), ())
    sums, hit_MJ, gradients, head_gradient = lax.fori_loop(0, -(-count // size), chunk, (*empty, *slots))
    place_M = jnp.where(active_M, jnp.cumsum(active_M) - 1, total + size)
    gradients = tuple(take(x, place_M) for x in gradients)
    by_row = lambda x: x.reshape(num_batch, num_rows, *x.shape[1:])  # noqa: E731
    return jax.tree.map(by_row, (hit_MJ, gradients)), (sums, head_gradient)


def _later(x_BR: jax.Array, j: int) -> jax.Array:
    """x of the row j places before."""
    return jnp.pad(x_BR, ((0, 0), (j, 0)))[:, : x_BR.shape[1]]


def _forward(plan, states, head_DW, teacher, teacher_head_WE, supervised_JBR, accepted_J):
    out, gradients = _walk(plan, True, states, head_DW, teacher, teacher_head_WE, supervised_JBR, accepted_J)
    return out, (gradients, jnp.zeros((0,), head_DW.dtype))


def _backward(plan, residuals, cotangent):
    (states, head_DW), like = residuals
    slope_J = cotangent[0].loss_J
    weight_J = jnp.asarray(plan.step_weights, slope_J.dtype)
    share = slope_J[0] / weight_J[0]
    known = jnp.all(jnp.abs(slope_J - share * weight_J) <= 1e-5 * jnp.abs(share * weight_J))
    share = jnp.where(known, share, jnp.nan)
    states = tuple(scaled(x, share, x.dtype) for x in states)
    return states, scaled(head_DW, share, like.dtype), None, None, None, None


distill.defvjp(_forward, _backward)
