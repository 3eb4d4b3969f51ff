"""What a slot is trained towards: the text's token, and the target's own distribution there.

Shape letters: B batch, R rows, C rows of a chunk, E target width, V vocabulary, or a device's part of it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flaxdraft.ops import vocabulary_axis
from flaxdraft.ops.corrected_head import Made, Told
from flaxdraft.ops.cross_entropy import of_logits, slope_of


class Asked(NamedTuple):
    """What is asked of each row."""

    label_BR: Int[Array, "B R"]
    weight_BR: Float[Array, "B R"]  # in the total; 0 where nothing is asked
    last_BRE: Float[Array, "B R E"]  # the target's state that predicts the label, behind its final norm


class Known(NamedTuple):
    """What is known of each row."""

    loss_BR: Float[Array, "B R"]  # cross entropy with the label
    hit_BR: Bool[Array, "B R"]
    distance_BR: Float[Array, "B R"]  # sum over the vocabulary of |p_draft - p_target|, at most 2
    teacher_hit_BR: Bool[Array, "B R"]  # the target's likeliest token is the label


class Shares(NamedTuple):
    """Of the two losses."""

    cross_entropy: Float[Array, ""]
    distance: Float[Array, ""]


def text_and_teacher(made: Made, rows: Asked, shares: Shares) -> Told:
    """weight (share CE + share distance). With p the draft's distribution, q the target's and s the sign of p - q, the
    derivative of the distance by a logit is p (s - sum of p s)."""
    axis, weight_C1, wide = made.axis, rows.weight_BR[:, None], made.final_CV.dtype
    scored, logsumexp_C = of_logits(made.final_CV, rows.label_BR, axis)
    teacher_CV = jnp.einsum("ce,ve->cv", rows.last_BRE, made.frozen_VD, preferred_element_type=wide)
    teacher_top_C = vocabulary_axis.highest(teacher_CV, axis)
    p_CV, gap_CV = jnp.exp(made.final_CV - logsumexp_C[:, None]), -vocabulary_axis.softmax(teacher_CV, axis)
    gap_CV = gap_CV + p_CV
    distance_C = vocabulary_axis.total(jnp.sum(jnp.abs(gap_CV), axis=-1), axis)
    leaning_C = vocabulary_axis.total(jnp.sum(p_CV * jnp.sign(gap_CV), axis=-1), axis)
    by_distance_CV = p_CV * (jnp.sign(gap_CV) - leaning_C[:, None])
    by_text_CV = slope_of(made.final_CV, logsumexp_C, rows.label_BR, axis)
    by_final_CV = weight_C1 * (shares.cross_entropy * by_text_CV + shares.distance * by_distance_CV)
    total = jnp.sum(rows.weight_BR * (shares.cross_entropy * scored.loss_BR + shares.distance * distance_C))
    teacher_hit_C = vocabulary_axis.first_at(teacher_CV, teacher_top_C, axis) == rows.label_BR
    return Told(Known(*scored, distance_C, teacher_hit_C), total, by_final_CV, None)
