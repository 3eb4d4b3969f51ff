"""Losses of logits that a frozen head makes, and of a choice among each row's likeliest tokens, its candidates:

    unary = made_of(states @ head.T);  candidates: the tokens of the highest unary logits
    score = unary + latents . codebook row, of candidates alone
    total = weight (CE(unary) + share CE(scores)), the latter where the label is a candidate

With `Candidates.insert` a label that is no candidate takes the last candidate's place, so that the scores' loss counts
in every row.

The codebook is a trained matrix over the whole vocabulary, of which only the candidates' rows are read. The walk over
chunks and the gradient's accumulator are those of ops/corrected_head.py.

Shape letters: B batch, R rows, C rows of a chunk, D width, E width of latents and codebook, K candidates, V vocabulary,
or a device's part of it (ops/vocabulary_axis.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from flaxdraft.ops import vocabulary_axis
from flaxdraft.ops.corrected_head import Chunk, Heads, Inputs, Labels, walked
from flaxdraft.ops.cross_entropy import How, Scored, of_logits, slope_of


class Choice(NamedTuple):
    """What is known of a row's choice among its candidates."""

    loss_BR: Float[Array, "B R"]  # -log of the label's share among them; 0 where it is none
    hit_BR: Bool[Array, "B R"]  # the label is a candidate and has the highest score, of equal ones the lowest id
    covered_BR: Bool[Array, "B R"]  # the label is a candidate, and was not put among them


class Candidates(NamedTuple):
    """See the head of this file.

    most: candidates of a row.
    coupled: whether the scores' loss reaches the states through the unary logits.
    insert: whether a label that is no candidate takes the place of the last one.
    """

    most: int
    coupled: bool
    insert: bool = False

    def __call__(self, chunk: Chunk) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        (state_CD, latent_CE), heads, logits = chunk.inputs, chunk.heads, chunk.how.logits
        (label_C, weight_C), axis = chunk.rows, chunk.axis
        product = partial(jnp.einsum, preferred_element_type=jnp.promote_types(state_CD.dtype, jnp.float32))
        unary_CV = logits.of(product("cd,vd->cv", state_CD, heads.frozen_VD))
        unary, logsumexp_C = of_logits(unary_CV, label_C, axis)
        top_CK, id_CK = vocabulary_axis.top(unary_CV, self.most, axis)
        covered_C = jnp.any(id_CK == label_C[:, None], axis=1)
        if self.insert:
            put = lambda x_CK, own_C: x_CK.at[:, -1].set(jnp.where(covered_C, x_CK[:, -1], own_C))  # noqa: E731
            top_CK, id_CK = put(top_CK, logsumexp_C - unary.loss_BR), put(id_CK, label_C)
        own_CK = _own(id_CK, unary_CV.shape[1], axis)
        codes_CKE = heads.correction_VE.at[own_CK].get(mode="fill", fill_value=0)
        score_CK = top_CK + vocabulary_axis.total(product("ce,cke->ck", latent_CE, codes_CKE), axis)
        choice, by_score_CK = chosen(score_CK, id_CK, label_C, covered_C)
        of_choice_C = weight_C * chunk.more
        total = jnp.sum(weight_C * unary.loss_BR + of_choice_C * choice.loss_BR)
        if not chunk.want_gradients:
            return ((unary, choice), ()), (total, ())
        by_score_CK = by_score_CK * of_choice_C[:, None]
        by_unary_CV = slope_of(unary_CV, logsumexp_C, label_C, axis) * weight_C[:, None]
        if self.coupled:
            rows_C1 = jnp.arange(len(own_CK))[:, None]
            by_unary_CV = by_unary_CV.at[rows_C1, own_CK].add(by_score_CK, mode="drop")
        by_unary_CV = (by_unary_CV * logits.slope(unary_CV)).astype(state_CD.dtype)
        by_codes_CKE = by_score_CK[..., None] * latent_CE[:, None].astype(by_score_CK.dtype)
        back = Inputs(
            product("cv,vd->cd", by_unary_CV, heads.frozen_VD),
            product("ck,cke->ce", by_score_CK.astype(latent_CE.dtype), codes_CKE),
        )
        to_codes_VE = jnp.zeros(heads.correction_VE.shape, by_codes_CKE.dtype).at[own_CK].add(by_codes_CKE, mode="drop")
        return ((unary, choice), jax.tree.map(lambda x: x.astype(state_CD.dtype), back)), (total, to_codes_VE)


def _own(id_CK: Int[Array, "C K"], size: int, axis: str | None) -> Int[Array, "C K"]:
    """Of ids of the whole vocabulary, those of this device's part; others lie past its end."""
    if axis is None:
        return id_CK
    own_CK = id_CK - lax.axis_index(axis) * size
    return jnp.where((own_CK >= 0) & (own_CK < size), own_CK, size)


def chosen(
    score_CK: Float[Array, "C K"], id_CK: Int[Array, "C K"], label_C: Int[Array, " C"], covered_C: Bool[Array, " C"]
) -> tuple[Choice, Float[Array, "C K"]]:
    """What is known of each row's choice, and the gradient of its loss by the scores.

    Args:
        covered_C: where the label would be a candidate if nobody put it among them.
    """
    right_CK = id_CK == label_C[:, None]
    there_C = jnp.any(right_CK, axis=1)
    best_CK = score_CK == jnp.max(score_CK, axis=1, keepdims=True)
    first_C = jnp.min(jnp.where(best_CK, id_CK, jnp.iinfo(jnp.int32).max), axis=1)
    loss_C = jax.nn.logsumexp(score_CK, axis=1) - jnp.sum(jnp.where(right_CK, score_CK, 0), axis=1)
    slope_CK = jnp.where(there_C[:, None], jax.nn.softmax(score_CK, axis=1) - right_CK, 0)
    return Choice(jnp.where(there_C, loss_C, 0), covered_C & (first_C == label_C), covered_C), slope_CK


def candidate_cross_entropy(
    candidates: Candidates, how: How, inputs: Inputs, heads: Heads, rows: Labels, asked_BR: Bool[Array, "B R"],
    share: Float[Array, ""],
) -> tuple[Float[Array, ""], tuple[Scored, Choice]]:  # fmt: skip
    """See the head of this file: the total, and what is known of each row by its unary logits and by its scores."""
    return walked(candidates, how, inputs, heads, rows, asked_BR, share)
