"""What a draft row is trained towards: each objective maps draft logits and their teacher to one loss a row.

`OBJECTIVES` finds them by the name of the run configuration. p is the teacher over the draft vocabulary (normalised
there), p_full its probabilities in the full vocabulary, q the draft's; alpha = sum_w min(p_full[w], q[w]) is the
acceptance of the rejection scheme (arXiv 2211.17192). The draft vocabulary may be split over devices, see
ops/vocabulary_axis.py.

Shape letters: C rows, W draft vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flaxdraft.ops.vocabulary_axis import at, logsumexp, softmax, total

# Of lk_lambda: how fast the divergence gives way to the acceptance (arXiv 2602.23881).
LK_ETA = 3.0


class TeacherRows(NamedTuple):
    """What the target says about some rows at one step."""

    logits_CW: Float[Array, "C W"]  # of the draft vocabulary
    draft_logsumexp_C: Float[Array, " C"]  # over the draft vocabulary
    logsumexp_C: Float[Array, " C"]  # over the full vocabulary
    draft_argmax_C: Int[Array, " C"]  # draft id of the full-vocabulary argmax, -1 outside the draft vocabulary
    axis: str | None = None  # of the mesh, that splits the draft vocabulary

    def draft_probabilities(self) -> Float[Array, "C W"]:
        """p of each row."""
        return jnp.exp(self.logits_CW - self.draft_logsumexp_C[:, None])


def acceptance(logits_CW: Float[Array, "C W"], teacher: TeacherRows) -> Float[Array, " C"]:
    """alpha of each row."""
    full_CW = jnp.exp(teacher.logits_CW - teacher.logsumexp_C[:, None])
    return total(jnp.sum(jnp.minimum(full_CW, softmax(logits_CW, teacher.axis)), axis=-1), teacher.axis)


def soft_cross_entropy(logits_CW: Float[Array, "C W"], teacher: TeacherRows, accepted) -> Float[Array, " C"]:
    """-sum_w p[w] log q[w]: the forward divergence but for the teacher's entropy, which has no gradient."""
    p_CW = teacher.draft_probabilities()
    return logsumexp(logits_CW, teacher.axis) - total(jnp.sum(p_CW * logits_CW, axis=-1), teacher.axis)


def hard_label(logits_CW: Float[Array, "C W"], teacher: TeacherRows, accepted) -> Float[Array, " C"]:
    """-log q[argmax of the target]."""
    label_C = jnp.maximum(teacher.draft_argmax_C, 0)
    return logsumexp(logits_CW, teacher.axis) - at(logits_CW, label_C, teacher.axis)


def lk_alpha(logits_CW: Float[Array, "C W"], teacher: TeacherRows, accepted) -> Float[Array, " C"]:
    """-log alpha (arXiv 2602.23881)."""
    alpha_C = acceptance(logits_CW, teacher)
    # Both branches of a `where` are differentiated: log must not see the 0 of a row that accepts nothing.
    some_C = alpha_C > 0
    return jnp.where(some_C, -jnp.log(jnp.where(some_C, alpha_C, 1.0)), 0.0)


def lk_lambda(logits_CW: Float[Array, "C W"], teacher: TeacherRows, accepted) -> Float[Array, " C"]:
    """lambda KL(p, q) + (1 - lambda)(1 - alpha) with lambda = exp(-eta accepted) (arXiv 2602.23881; SpecForge,
    core/lk_loss.py, with kl_scale 1 and kl_decay 3).

    Args:
        accepted: the mean acceptance of each row's step over the whole previous global batch.
    """
    p_CW = teacher.draft_probabilities()
    plogp_CW = jnp.where(p_CW > 0, p_CW * jnp.log(jnp.where(p_CW > 0, p_CW, 1.0)), 0.0)
    entropy_C = -total(jnp.sum(plogp_CW, axis=-1), teacher.axis)
    divergence_C = soft_cross_entropy(logits_CW, teacher, accepted) - entropy_C
    share = jnp.exp(-LK_ETA * accepted)
    return share * divergence_C + (1 - share) * (1 - acceptance(logits_CW, teacher))


OBJECTIVES = {
    "soft_cross_entropy": soft_cross_entropy,
    "hard_label": hard_label,
    "lk_alpha": lk_alpha,
    "lk_lambda": lk_lambda,
}
