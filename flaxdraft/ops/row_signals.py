"""What the walk needs of a chunk's draft logits: loss, its slope, top-1 hit, acceptance.

The logits of all unroll steps of a chunk are hundreds of megabytes, so what counts is how often they are read. Three
passes do: the maximum; the sum of exponentials and the place of the maximum; what is made of probabilities.
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
    top_Q1 = jnp.max(logits_QW, axis=-1, keepdims=True)
    hit_Q = _hits(logits_QW, top_Q1, teacher)
    if objective != "soft_cross_entropy":
        return _differentiated(objective, logits_QW, teacher, accepted_Q, weight_Q, hit_Q)
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


def _hits(logits_QW, top_Q1, teacher: TeacherRows) -> Bool[Array, " Q"]:
    """Whether argmax is the teacher's token. The first place of the maximum is an ordinary minimum, made in the same
    pass as the sums; a reduction that carries an index along is not."""
    vocab_size = logits_QW.shape[-1]
    at_QW = jnp.where(logits_QW == top_Q1, jnp.arange(vocab_size, dtype=jnp.int32)[None], vocab_size)
    return jnp.min(at_QW, axis=-1) == teacher.draft_argmax_C


def _differentiated(objective, logits_QW, teacher, accepted_Q, weight_Q, hit_Q) -> RowSignals:
    def losses(logits_QW):
        return OBJECTIVES[objective](logits_QW, teacher, accepted_Q)

    accept_Q = acceptance(logits_QW, teacher)
    if weight_Q is None:
        return RowSignals(losses(logits_QW), hit_Q, accept_Q, None)
    loss_Q, pull = jax.vjp(losses, logits_QW)
    return RowSignals(loss_Q, hit_Q, accept_Q, pull(weight_Q.astype(loss_Q.dtype))[0])
