"""Cross entropy with hard labels of logits that a frozen head makes, and of the same logits corrected:

    base = made_of(states @ head.T);  final = base + latents @ correction.T
    total = sum over rows of weight ((1 - share) CE(final) + share CE(base))

The correction is a trained matrix over the whole vocabulary and narrow; both losses come from one product with the
head, in chunks of rows (see ops/cross_entropy.py), with one float32 accumulator for the correction's gradient. That
gradient is a sum over rows, made in the same walk as the losses, so the weights must be known before it.

Shape letters: B batch, R rows, C rows of a chunk, D width, E width of the latents, V vocabulary, or a device's part of
it.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, cast

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


class Rows(NamedTuple):
    """What is asked of each row."""

    label_BR: Int[Array, "B R"]
    weight_BR: Float[Array, "B R"]  # in the total
    asked_BR: Bool[Array, "B R"]


class Corrected(NamedTuple):
    """The total, which alone has a gradient, and what is known of each row with the correction and without it."""

    total: Float[Array, ""]
    final: Scored
    base: Scored


def corrected_cross_entropy(
    how: How, inputs: Inputs, heads: Heads, rows: Rows, base_share: Float[Array, ""]
) -> Corrected:
    """See the head of this file."""
    # JAX types a custom_vjp that has options as giving anything.
    return cast(Corrected, _scored(how, inputs, heads, rows, base_share))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scored(how: How, inputs: Inputs, heads: Heads, rows: Rows, base_share) -> Corrected:
    return _walk(how, False, inputs, heads, rows, base_share)[0]


def _walk(how: How, want_gradients, inputs: Inputs, heads: Heads, rows: Rows, base_share):
    rows_spec, head_spec = spec_of(inputs.states_BRD).partitions[:2], spec_of(heads.correction_VE)
    rows_axes, axis = axes_of(rows_spec), partitions_of(head_spec)[0]
    assert axis == partitions_of(spec_of(heads.frozen_VD))[0], "both heads are split alike"

    def local(inputs, heads, rows, base_share):
        one = partial(_rows, how, axis, want_gradients, _narrow(heads, inputs), base_share)
        (known, back), (total, to_head) = in_chunks(one, how.chunk, rows.asked_BR, (inputs, rows))
        total = added_up(total, jax.P(), rows_axes)
        if want_gradients:
            back = back if axis is None else jax.tree.map(lambda x: lax.psum(x, axis), back)
            to_head = added_up(to_head, head_spec, rows_axes)
        return (total, *map(tuple, known)), (back, to_head)

    by_row = jax.P(*rows_spec), jax.P(*rows_spec)
    back_specs = (
        (jax.tree.map(gradient_spec, inputs), gradient_spec(heads.correction_VE)) if want_gradients else ((), ())
    )
    out_specs = (jax.P(), by_row, by_row), back_specs
    found, back = per_device(local, out_specs, inputs, heads, rows, base_share)
    total, final, base = found
    return Corrected(total, Scored(*final), Scored(*base)), back


def _narrow(heads: Heads, inputs: Inputs) -> Heads:
    return jax.tree.map(lambda x: x.astype(inputs.states_BRD.dtype), heads)


def _rows(how: How, axis, want_gradients, heads: Heads, base_share, chunk: tuple[Inputs, Rows]):
    """What is known of the rows of one chunk, and this device's parts of the gradients."""
    (state_CD, latent_CE), (label_C, weight_C, _) = chunk
    wide = jnp.promote_types(state_CD.dtype, jnp.float32)
    product = partial(jnp.einsum, preferred_element_type=wide)
    base_CV = how.logits.of(product("cd,vd->cv", state_CD, heads.frozen_VD))
    final_CV = base_CV + product("ce,ve->cv", latent_CE, heads.correction_VE)
    (base, base_logsumexp_C), (final, final_logsumexp_C) = (of_logits(x, label_C, axis) for x in (base_CV, final_CV))
    of_final_C, of_base_C = weight_C * (1 - base_share), weight_C * base_share
    total = jnp.sum(of_final_C * final.loss_BR + of_base_C * base.loss_BR)
    if not want_gradients:
        return ((final, base), ()), (total, ())
    final_CV = slope_of(final_CV, final_logsumexp_C, label_C, axis) * of_final_C[:, None]
    both_CV = final_CV + slope_of(base_CV, base_logsumexp_C, label_C, axis) * of_base_C[:, None]
    both_CV, final_CV = (both_CV * how.logits.slope(base_CV)).astype(state_CD.dtype), final_CV.astype(state_CD.dtype)
    back = Inputs(product("cv,vd->cd", both_CV, heads.frozen_VD), product("cv,ve->ce", final_CV, heads.correction_VE))
    back = jax.tree.map(lambda x: x.astype(state_CD.dtype), back)
    return ((final, base), back), (total, product("cv,ce->ve", final_CV, latent_CE))


def _forward(how, inputs, heads, rows, base_share):
    found, (back, to_head) = _walk(how, True, inputs, heads, rows, base_share)
    return found, (back, to_head, jnp.zeros((0,), heads.correction_VE.dtype))


def _backward(how, residuals, cotangent):
    back, to_head, like = residuals
    back = jax.tree.map(lambda x: scaled(x, cotangent.total, x.dtype), back)
    return back, Heads(None, scaled(to_head, cotangent.total, like.dtype)), None, None  # pyright: ignore[reportArgumentType]


_scored.defvjp(_forward, _backward)
