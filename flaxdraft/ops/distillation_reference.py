"""The plain reference of `distillation`: every logit of every row at once, differentiated by JAX.

Shape letters: B batch, R rows, J steps, W draft vocabulary. The teacher of row r at step j is the teacher of
row r + j at step 0: supervision asks rows r..r+j to be consecutive, so teacher logits are needed once a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flaxdraft.ops.objectives import OBJECTIVES, TeacherRows, acceptance
from flaxdraft.ops.step_sums import StepSums


class Teacher(NamedTuple):
    """What the target predicts at each row of step 0."""

    logits_BRW: Float[Array, "B R W"]  # of the draft vocabulary
    logsumexp_BR: Float[Array, "B R"]  # over the full vocabulary
    draft_argmax_BR: Int[Array, "B R"]  # draft id of the full-vocabulary argmax, -1 outside the draft vocabulary


class StepSignals(NamedTuple):
    """One step, row by row."""

    loss_BR: Float[Array, "B R"]
    hit_BR: Bool[Array, "B R"]
    accept_BR: Float[Array, "B R"]


def shift_rows(x: Float[Array, "B R *tail"] | Int[Array, "B R *tail"], j: int, fill: float):
    """Row r becomes row r + j; the last j rows become `fill`."""
    if j == 0:
        return x
    pad = [(0, 0), (0, j)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x[:, j:], pad, constant_values=fill)


def step_signals(
    draft_logits_BRW: Float[Array, "B R W"],
    teacher: Teacher,
    j: int,
    objective: str = "soft_cross_entropy",
    accepted: float | Float[Array, ""] = 0.0,
) -> StepSignals:
    """Loss, top-1 hit and expected acceptance of step j, for every row, supervised or not; see ops/objectives.py."""
    logits_BRW = shift_rows(teacher.logits_BRW, j, 0.0)
    rows = TeacherRows(
        logits_BRW, jax.nn.logsumexp(logits_BRW, axis=-1), shift_rows(teacher.logsumexp_BR, j, 0.0),
        shift_rows(teacher.draft_argmax_BR, j, -1),
    )  # fmt: skip
    loss_BR = jax.vmap(lambda logits, rows: OBJECTIVES[objective](logits, rows, accepted))(draft_logits_BRW, rows)
    accept_BR = jax.vmap(acceptance)(draft_logits_BRW, rows)
    hit_BR = jnp.argmax(draft_logits_BRW, axis=-1).astype(jnp.int32) == rows.draft_argmax_C
    return StepSignals(loss_BR, hit_BR, jax.lax.stop_gradient(accept_BR))


def sum_signals(
    steps: Sequence[StepSignals], supervised_JBR: Bool[Array, "J B R"], teacher: Teacher, weights: tuple[float, ...]
) -> StepSums:
    """Masked sums, with the weights of the steps in the loss. A supervised row whose teacher argmax is outside the
    draft vocabulary has no loss and is a miss, but its expected acceptance counts."""
    loss, loss_count, rows, hits, prefix_hits, accepts = [], [], [], [], [], []
    prefix_BR = jnp.ones(supervised_JBR.shape[1:], bool)
    for j, step in enumerate(steps):
        supervised_BR = supervised_JBR[j]
        in_draft_BR = supervised_BR & (shift_rows(teacher.draft_argmax_BR, j, -1) >= 0)
        hit_BR = step.hit_BR & in_draft_BR
        prefix_BR = prefix_BR & hit_BR
        # `where`, not a product: an unsupervised row may hold anything, NaN included.
        loss.append(jnp.sum(jnp.where(in_draft_BR, step.loss_BR, 0.0)))
        accepts.append(jnp.sum(jnp.where(supervised_BR, step.accept_BR, 0.0)))
        for sums, mask in ((loss_count, in_draft_BR), (rows, supervised_BR), (hits, hit_BR), (prefix_hits, prefix_BR)):
            sums.append(jnp.sum(mask, dtype=jnp.int32))
    stack = jnp.stack
    return StepSums(
        stack(loss), stack(loss_count), stack(rows), stack(hits), stack(prefix_hits), stack(accepts), weights
    )  # fmt: skip
