"""Distillation in chunks of rows: teacher logits, draft logits, losses, metrics and gradients, all inside one chunk.

Logits never feed the recurrence, so the unroll runs first and the rows are walked afterwards. Supervised rows are
compacted on each device and the loop runs ceil(n / chunk) times; neither [rows, V] nor [rows, W] is ever held for all
rows. The gradient is made in the same walk, with one float32 accumulator for the head.

Shape letters: B batch, R rows, M = B R, J unroll steps, D draft width, E target width, V target vocabulary, W draft
vocabulary, C rows of a chunk, S = C + J - 1 rows with their teachers: the teacher of row r at step j is the teacher of
row r + j at step 0, since supervision asks rows r..r+j to be consecutive and each supervised by some step.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from flaxdraft.interfaces import LossSums
from flaxdraft.mesh import gradient_spec, per_shard, scaled
from flaxdraft.ops.objectives import OBJECTIVES, TeacherRows, acceptance

# In all of a run's shapes the products are as fast as with longer chunks; see experiments/bench_step.py.
DEFAULT_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class Plan:
    """What stays the same from call to call."""

    step_weights: tuple[float, ...]  # of the J steps in the loss
    objective: str = "soft_cross_entropy"  # a name of ops/objectives.py
    chunk: int = DEFAULT_CHUNK


class TeacherStates(NamedTuple):
    """The target at step 0 of each row, before its head; statistics that are None are made from the whole head."""

    last_BRE: Float[Array, "B R E"]
    logsumexp_BR: Float[Array, "B R"] | None  # over the full vocabulary
    draft_argmax_BR: Int[Array, "B R"] | None  # draft id of the full-vocabulary argmax, -1 outside the draft vocabulary


class TeacherHead(NamedTuple):
    """The target's head, no further than it is needed."""

    draft_WE: Float[Array, "W E"]  # the rows of the draft vocabulary
    full_VE: Float[Array, "V E"] | None = None  # where the states come without statistics
    draft_ids_V: Int[Array, " V"] | None = None  # draft id of each target id, -1 outside; beside full_VE


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def distill(
    plan: Plan,
    states: tuple[Float[Array, "B R D"], ...],
    head_DW: Float[Array, "D W"],
    teacher: TeacherStates,
    teacher_head: TeacherHead,
    supervised_JBR: Bool[Array, "J B R"],
    accepted_J: Float[Array, " J"],
) -> tuple[LossSums, Bool[Array, "B R J"]]:
    """The sums of all rows, and which rows the draft hits at each step.

    Only `loss_J` has a gradient (to `states` and `head_DW`), and only through its sum weighted by `plan.step_weights`,
    which is all that a loss needs of it: the walk makes the gradient of that sum alone. Any other combination of
    loss_J gives NaN.

    Args:
        states: the head's input of each step, in the precision of the products.
        head_DW: master weights; their gradient is as wide, and unreduced over the axes that their type calls reduced.
        accepted_J: see `objectives.lk_lambda`.
    """
    return _walk(plan, False, states, head_DW, teacher, teacher_head, supervised_JBR, accepted_J)[0]


def _walk(plan, want_gradients, states, head_DW, teacher, teacher_head, supervised_JBR, accepted_J):
    local = partial(_walk_shard, plan, want_gradients)
    split = states, teacher, jnp.moveaxis(supervised_JBR, 0, -1)
    whole, sums_spec = (head_DW, teacher_head, accepted_J), (jax.P(), gradient_spec(head_DW))
    (hit_BRJ, gradients), (sums, head_gradient) = per_shard(local, split, whole, sums_spec)
    return (sums, hit_BRJ), (gradients, head_gradient)


def _walk_shard(plan, want_gradients, states, teacher, supervised_BRJ, head_DW, teacher_head, accepted_J):
    num_steps, (num_batch, num_rows) = len(states), states[0].shape[:2]
    total, size = num_batch * num_rows, plan.chunk
    flat = lambda x: x.reshape(total, *x.shape[2:])  # noqa: E731
    states, teacher, supervised_MJ = jax.tree.map(flat, (states, teacher, supervised_BRJ))
    head = head_DW.astype(states[0].dtype)  # the master weights are wider
    wide = jnp.promote_types(states[0].dtype, jnp.float32)
    # Supervised rows first, in their order; what fills the last chunk lies past the end, and reads 0.
    active_M = jnp.any(supervised_MJ, axis=1)
    order, count = jnp.argsort(~active_M, stable=True), jnp.sum(active_M)
    order = jnp.where(jnp.arange(total) < count, order, total)
    order = jnp.pad(order, (0, size + num_steps - 1), constant_values=total)
    take = lambda x, at: x.at[at].get(mode="fill", fill_value=0)  # noqa: E731
    objective = OBJECTIVES[plan.objective]

    def chunk(i, carry):
        sums, hit_MJ, gradients, head_gradient = carry
        at_S = lax.dynamic_slice_in_dim(order, i * size, size + num_steps - 1)
        at_C = at_S[:size]
        last_SE, logsumexp_S, argmax_S = jax.tree.map(lambda x: take(x, at_S), teacher)
        teacher_SW = jnp.einsum("se,we->sw", last_SE, teacher_head.draft_WE, preferred_element_type=wide)
        if logsumexp_S is None:
            full_SV = jnp.einsum("se,ve->sv", last_SE, teacher_head.full_VE, preferred_element_type=wide)
            logsumexp_S = jax.nn.logsumexp(full_SV, axis=-1)
            argmax_S = teacher_head.draft_ids_V[jnp.argmax(full_SV, axis=-1)]
        prefix_C, columns, gradients = jnp.ones(size, bool), [], list(gradients)
        for j in range(num_steps):
            rows = TeacherRows(teacher_SW[j : j + size], logsumexp_S[j : j + size], argmax_S[j : j + size])
            supervised_C = take(supervised_MJ[:, j], at_C)
            in_draft_C = supervised_C & (rows.draft_argmax_C >= 0)
            state_CD = take(states[j], at_C)
            logits_CW = jnp.einsum("cd,dw->cw", state_CD, head, preferred_element_type=wide)
            loss_of = lambda logits, rows=rows, j=j: objective(logits, rows, accepted_J[j])  # noqa: E731
            if want_gradients:
                loss_C, pull = jax.vjp(loss_of, logits_CW)
                (slope_CW,) = pull(jnp.where(in_draft_C, plan.step_weights[j], 0.0).astype(loss_C.dtype))
                # An unsupervised row may hold anything: nothing of it may reach the head.
                slope_CW = jnp.where(in_draft_C[:, None], slope_CW, 0.0).astype(state_CD.dtype)
                state_CD = jnp.where(in_draft_C[:, None], state_CD, 0)
                back_CD = jnp.einsum("cw,dw->cd", slope_CW, head, preferred_element_type=wide)
                gradients[j] = gradients[j].at[at_C].set(back_CD.astype(state_CD.dtype), mode="drop")
                head_gradient += jnp.einsum("cd,cw->dw", state_CD, slope_CW, preferred_element_type=wide)
            else:
                loss_C = loss_of(logits_CW)
            hit_C = in_draft_C & (jnp.argmax(logits_CW, axis=-1) == rows.draft_argmax_C)
            prefix_C = prefix_C & hit_C
            columns.append((
                jnp.sum(jnp.where(in_draft_C, loss_C, 0.0)), in_draft_C, supervised_C, hit_C, prefix_C,
                jnp.sum(jnp.where(supervised_C, acceptance(logits_CW, rows), 0.0)),
            ))  # fmt: skip
        loss_J, *counted, accept_J = (jnp.stack(column) for column in zip(*columns, strict=True))
        counts = (jnp.sum(mask_JC, axis=1, dtype=jnp.int32) for mask_JC in counted)
        hit_MJ = hit_MJ.at[at_C].set(counted[2].T, mode="drop")
        return sums + LossSums(loss_J, *counts, accept_J), hit_MJ, tuple(gradients), head_gradient

    zeros = jnp.zeros(num_steps, wide)
    none = jnp.zeros(num_steps, jnp.int32)
    empty = LossSums(zeros, none, none, none, none, zeros), jnp.zeros((total, num_steps), bool)
    slots = jax.tree.map(jnp.zeros_like, states), jnp.zeros(head_DW.shape, wide)
    slots = slots if want_gradients else ((), ())
    sums, hit_MJ, gradients, head_gradient = lax.fori_loop(0, -(-count // size), chunk, (*empty, *slots))
    apart = lambda x: x.reshape(num_batch, num_rows, *x.shape[1:])  # noqa: E731
    return jax.tree.map(apart, (hit_MJ, gradients)), (sums, head_gradient)


def _forward(plan, states, head_DW, teacher, teacher_head, supervised_JBR, accepted_J):
    out, gradients = _walk(plan, True, states, head_DW, teacher, teacher_head, supervised_JBR, accepted_J)
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
