"""What the walk needs of a chunk's draft logits: loss, its slope, top-1 hit, acceptance.

The logits of all steps of a chunk are hundreds of megabytes, so what counts is how often they are read. Three
passes do: the maximum; the sum of exponentials and the place of the maximum; what is made of probabilities.
The slope of the soft cross-entropy is written down (q - p) instead of found by differentiation, which would read more.

Shape letters: Q rows of all steps of a chunk, W draft vocabulary, or a device's part of it (`TeacherRows.axis`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flaxdraft.ops import vocabulary_axis
from flaxdraft.ops.objectives import OBJECTIVES, TeacherRows, acceptance
from flaxdraft.ops.vocabulary_axis import total


class RowSignals(NamedTuple):
    """One chunk, row by row."""

    loss_Q: Float[Array, " Q"]
    hit_Q: Bool[Array, " Q"]  # the draft's top-1 is the target's
    accept_Q: Float[Array, " Q"]  # sum_w min(p_full[w], q[w])
    slope_QW: Float[Array, "Q W"] | None  # of weight * loss by the logits


def row_signals(
    objective: str,
    logits_QW: Float[Array, "Q W"],
    teacher: TeacherRows,
    accepted_Q: Float[Array, " Q"],
    weight_Q: Float[Array, " Q"] | None,
) -> RowSignals:
    """
    Args:
        objective: a name of ops/objectives.py.
        accepted_Q: see `objectives.lk_lambda`.
        weight_Q: of each row's loss in what is differentiated; None leaves the slope out.
    """
    axis = teacher.axis
    top_Q1 = vocabulary_axis.highest(logits_QW, axis)[:, None]
    hit_Q = vocabulary_axis.first_at(logits_QW, top_Q1[:, 0], axis) == teacher.draft_argmax_C
    if objective != "soft_cross_entropy":
        return _differentiated(objective, logits_QW, teacher, accepted_Q, weight_Q, hit_Q)
    total_Q = total(jnp.sum(jnp.exp(logits_QW - top_Q1), axis=-1), axis)
    p_QW = teacher.draft_probabilities()
    expected_Q = total(jnp.sum(p_QW * logits_QW, axis=-1), axis)
    logsumexp_Q = top_Q1[:, 0] + jnp.log(total_Q)
    q_QW = jnp.exp(logits_QW - logsumexp_Q[:, None])
    # The teacher's probability of falling into the draft vocabulary: one exponential serves p and p_full.
    inside_Q = jnp.exp(teacher.draft_logsumexp_C - teacher.logsumexp_C)
    accept_Q = total(jnp.sum(jnp.minimum(inside_Q[:, None] * p_QW, q_QW), axis=-1), axis)
    slope_QW = None if weight_Q is None else weight_Q[:, None] * (q_QW - p_QW)
    return RowSignals(logsumexp_Q - expected_Q, hit_Q, accept_Q, slope_QW)


def _differentiated(objective, logits_QW, teacher, accepted_Q, weight_Q, hit_Q) -> RowSignals:
    def losses(logits_QW):
        return OBJECTIVES[objective](logits_QW, teacher, accepted_Q)

    accept_Q = acceptance(logits_QW, teacher)
    if weight_Q is None:
        return RowSignals(losses(logits_QW), hit_Q, accept_Q, None)
    loss_Q, pull = jax.vjp(losses, logits_QW)
    return RowSignals(loss_Q, hit_Q, accept_Q, pull(weight_Q.astype(loss_Q.dtype))[0])
