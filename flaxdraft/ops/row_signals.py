"""What the walk needs of a chunk's draft logits: loss, its slope, top-1 hit, acceptance.

The logits of all unroll steps of a chunk are hundreds of megabytes, so what counts is how often they are read. Three
passes do: the maximum; the sums of exponentials, of teacher times logit, and of better tokens; acceptance and slope.
The slope of the soft cross-entropy is written down (q - p) instead of found by differentiation, which would read more.

Shape letters: Q rows of all steps of a chunk, W draft vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flaxdraft.ops.objectives import OBJECTIVES, TeacherRows, acceptance


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
    hit_Q = _is_first_highest(logits_QW, teacher)
    if objective != "soft_cross_entropy":
        return _differentiated(objective, logits_QW, teacher, accepted_Q, weight_Q, hit_Q)
    top_Q1 = jnp.max(logits_QW, axis=-1, keepdims=True)
    total_Q = jnp.sum(jnp.exp(logits_QW - top_Q1), axis=-1)
    p_QW = teacher.draft_probabilities()
    expected_Q = jnp.sum(p_QW * logits_QW, axis=-1)
    logsumexp_Q = top_Q1[:, 0] + jnp.log(total_Q)
    q_QW = jnp.exp(logits_QW - logsumexp_Q[:, None])
    # The teacher's probability of falling into the draft vocabulary: one exponential serves p and p_full.
    inside_Q = jnp.exp(teacher.draft_logsumexp_C - teacher.logsumexp_C)
    accept_Q = jnp.sum(jnp.minimum(inside_Q[:, None] * p_QW, q_QW), axis=-1)
    slope_QW = None if weight_Q is None else weight_Q[:, None] * (q_QW - p_QW)
    return RowSignals(logsumexp_Q - expected_Q, hit_Q, accept_Q, slope_QW)


def _is_first_highest(logits_QW, teacher: TeacherRows) -> Bool[Array, " Q"]:
    """Whether argmax (the first of the highest) is the teacher's token: no better one is counted. A count is an
    ordinary sum, made in the same pass as others; an argmax is not."""
    token_Q1 = teacher.draft_argmax_C[:, None]
    there_Q1 = jnp.take_along_axis(logits_QW, jnp.maximum(token_Q1, 0), axis=-1)
    earlier_QW = jnp.arange(logits_QW.shape[-1])[None] < token_Q1
    better_QW = jnp.where(earlier_QW, logits_QW >= there_Q1, logits_QW > there_Q1)
    return (token_Q1[:, 0] >= 0) & (jnp.sum(better_QW, axis=-1, dtype=jnp.float32) == 0)


def _differentiated(objective, logits_QW, teacher, accepted_Q, weight_Q, hit_Q) -> RowSignals:
    def losses(logits_QW):
        return OBJECTIVES[objective](logits_QW, teacher, accepted_Q)

    accept_Q = acceptance(logits_QW, teacher)
    if weight_Q is None:
        return RowSignals(losses(logits_QW), hit_Q, accept_Q, None)
    loss_Q, pull = jax.vjp(losses, logits_QW)
    return RowSignals(loss_Q, hit_Q, accept_Q, pull(weight_Q.astype(loss_Q.dtype))[0])
