"""Losses of logits that a frozen head makes, corrected by a trained one:

    base = made_of(states @ head.T);  final = base + latents @ correction.T

The correction is a trained matrix over the whole vocabulary, and narrow. A rule says what the losses of some rows are
and how they depend on these logits; the products with the heads are here, in chunks of rows (ops/row_chunks.py), with
one float32 accumulator for the correction's gradient. That gradient is a sum over rows, made in the same walk as the
losses, so what the rows weigh must be known before it.

Shape letters: B batch, R rows, C rows of a chunk, D width, E width of the latents, V vocabulary, or a device's part of
it (ops/vocabulary_axis.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from flaxdraft.devices.per_device import added_up, per_device, scaled
from flaxdraft.devices.sharding import axes_of, gradient_spec, partitions_of, spec_of
from flaxdraft.ops.cross_entropy import How, Scored, of_logits, slope_of
from flaxdraft.ops.row_chunks import in_chunks


class Inputs(NamedTuple):
    """What logits are made of, in the precision of the products."""

    states_BRD: Float[Array, "B R D"]
    latents_BRE: Float[Array, "B R E"]  # 0: nothing is corrected


class Heads(NamedTuple):
    """What makes logits of them; both are split by vocabulary alike."""

    frozen_VD: Float[Array, "V D"]
    correction_VE: Float[Array, "V E"]  # master weights; their gradient is as wide


class Made(NamedTuple):
    """The logits of the rows of a chunk, at least float32, on one device."""

    base_CV: Float[Array, "C V"]
    final_CV: Float[Array, "C V"]
    frozen_VD: Float[Array, "V D"]  # the head, for what else a rule makes with it
    axis: str | None  # of the mesh, that splits the vocabulary


class Told(NamedTuple):
    """What a rule says of the rows of a chunk."""

    known: Any  # of each row: arrays [C, ...], the same on every device
    total: Float[Array, ""]  # the weighted losses, added up
    by_final_CV: Float[Array, "C V"]  # the total's derivative by the corrected logits
    by_base_CV: Float[Array, "C V"] | None  # by the others, where these have a loss of their own; None: they have none


# (logits, what is asked of the rows of the chunk, further numbers) -> what is said of them
Rule = Callable[[Made, Any, Any], Told]


class Chunk(NamedTuple):
    """Some rows on one device, and all that is there to make losses of them."""

    how: How
    heads: Heads  # in the precision of the products
    axis: str | None  # of the mesh, that splits the vocabulary
    want_gradients: bool
    inputs: Inputs  # of these rows: [C, ...]
    rows: Any  # what is asked of each: arrays [C, ...]
    more: Any


# What is known of each row of a chunk and the gradients of the total by its inputs, () where none are wanted; the
# total, and its gradient by the correction, at least float32, or (). Gradients are this device's parts.
OfChunk = Callable[[Chunk], tuple[tuple[Any, Any], tuple[Any, Any]]]


def walked(
    of_chunk: OfChunk, how: How, inputs: Inputs, heads: Heads, rows: Any, asked_BR: Bool[Array, "B R"], more: Any = ()
) -> tuple[Float[Array, ""], Any]:
    """The total, which alone has a gradient, to inputs and correction; and what is known of each row.

    Args:
        of_chunk: a function of a module, or a named tuple that is called. JAX compiles the walk anew for each that is
            not equal to an earlier one, as no two lambdas are.
        rows: arrays [B, R, ...].
        more: further numbers, the same for all rows.
    """
    # JAX types a custom_vjp that has options as giving anything.
    found: Any = _total(of_chunk, how, inputs, heads, rows, asked_BR, more)
    return found


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _total(of_chunk: OfChunk, how: How, inputs: Inputs, heads: Heads, rows, asked, more):
    return _walk(of_chunk, how, False, inputs, heads, rows, asked, more)[0]


def _walk(of_chunk, how: How, want_gradients, inputs: Inputs, heads: Heads, rows, asked, more):
    rows_spec, head_spec = spec_of(inputs.states_BRD).partitions[:2], spec_of(heads.correction_VE)
    rows_axes, axis = axes_of(rows_spec), partitions_of(head_spec)[0]
    assert axis == partitions_of(spec_of(heads.frozen_VD))[0], "both heads are split alike"

    def local(inputs, heads, rows, asked, more):
        narrow = jax.tree.map(lambda x: x.astype(inputs.states_BRD.dtype), heads)
        one = lambda of: of_chunk(Chunk(how, narrow, axis, want_gradients, of[0], of[1], more))  # noqa: E731
        (known, back), (total, to_head) = in_chunks(one, how.chunk, asked, (inputs, rows))
        total = added_up(total, jax.P(), rows_axes)
        if want_gradients:
            back = back if axis is None else jax.tree.map(lambda x: lax.psum(x, axis), back)
            to_head = added_up(to_head, head_spec, rows_axes)
        return (total, known), (back, to_head)

    back_specs = jax.tree.map(gradient_spec, (inputs, heads.correction_VE)) if want_gradients else ((), ())
    return per_device(
        local, ((jax.P(), jax.P(*rows_spec)), back_specs), inputs, heads, rows, asked, more
    )  # fmt: skip


def _forward(of_chunk, how, inputs, heads, rows, asked, more):
    found, (back, to_head) = _walk(of_chunk, how, True, inputs, heads, rows, asked, more)
    return found, (back, to_head, jnp.zeros((0,), heads.correction_VE.dtype))


def _backward(of_chunk, how, residuals, cotangent):
    (back, to_head, like), share = residuals, cotangent[0]
    back = jax.tree.map(lambda x: scaled(x, share, x.dtype), back)
    return back, Heads._make((None, scaled(to_head, share, like.dtype))), None, None, None


_total.defvjp(_forward, _backward)


class Products(NamedTuple):
    """Makes and corrects every logit of a chunk, and asks a rule what the losses are."""

    rule: Rule  # a function of a module

    def __call__(self, chunk: Chunk) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        (state_CD, latent_CE), heads, how = chunk.inputs, chunk.heads, chunk.how
        product = partial(jnp.einsum, preferred_element_type=jnp.promote_types(state_CD.dtype, jnp.float32))
        base_CV = how.logits.of(product("cd,vd->cv", state_CD, heads.frozen_VD))
        final_CV = base_CV + product("ce,ve->cv", latent_CE, heads.correction_VE)
        made = Made(base_CV, final_CV, heads.frozen_VD, chunk.axis)
        known, total, by_final_CV, by_base_CV = self.rule(made, chunk.rows, chunk.more)
        if not chunk.want_gradients:
            return (known, ()), (total, ())
        both_CV = by_final_CV if by_base_CV is None else by_final_CV + by_base_CV
        both_CV = (both_CV * how.logits.slope(base_CV)).astype(state_CD.dtype)
        by_final_CV = by_final_CV.astype(state_CD.dtype)
        back = Inputs(
            product("cv,vd->cd", both_CV, heads.frozen_VD), product("cv,ve->ce", by_final_CV, heads.correction_VE)
        )
        back = jax.tree.map(lambda x: x.astype(state_CD.dtype), back)
        return (known, back), (total, product("cv,ce->ve", by_final_CV, latent_CE))


def corrected(
    rule: Rule, how: How, inputs: Inputs, heads: Heads, rows: Any, asked_BR: Bool[Array, "B R"], more: Any = ()
) -> tuple[Float[Array, ""], Any]:
    """See `walked`; what is said of rows is the rule's."""
    return walked(Products(rule), how, inputs, heads, rows, asked_BR, more)


class Labels(NamedTuple):
    """What is asked of each row by `two_losses`."""

    label_BR: Int[Array, "B R"]
    weight_BR: Float[Array, "B R"]  # in the total; 0 where nothing is asked


def two_losses(made: Made, rows: Labels, base_share: Float[Array, ""]) -> Told:
    """weight ((1 - base_share) CE(final) + base_share CE(base)), and the `Scored` of both."""
    (label_C, weight_C), axis = rows, made.axis
    final, final_logsumexp_C = of_logits(made.final_CV, label_C, axis)
    base, base_logsumexp_C = of_logits(made.base_CV, label_C, axis)
    of_final_C, of_base_C = weight_C * (1 - base_share), weight_C * base_share
    total = jnp.sum(of_final_C * final.loss_BR + of_base_C * base.loss_BR)
    by_final_CV = slope_of(made.final_CV, final_logsumexp_C, label_C, axis) * of_final_C[:, None]
    by_base_CV = slope_of(made.base_CV, base_logsumexp_C, label_C, axis) * of_base_C[:, None]
    return Told((final, base), total, by_final_CV, by_base_CV)


def corrected_cross_entropy(
    how: How, inputs: Inputs, heads: Heads, rows: Labels, asked_BR: Bool[Array, "B R"], base_share: Float[Array, ""]
) -> tuple[Float[Array, ""], tuple[Scored, Scored]]:
    """See `two_losses`: the total, and what is known of each row with the correction and without it."""
    return corrected(two_losses, how, inputs, heads, rows, asked_BR, base_share)
