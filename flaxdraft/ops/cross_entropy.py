"""Cross entropy with hard labels over a whole vocabulary, in chunks of rows: logits, losses, hits and gradients, all
inside one chunk.

Only rows that are asked are gone through (ops/row_chunks.py), and [rows, V] is never held for all of them. The gradient
of each row's loss by its own state is computed in the same pass over the chunks and kept without a weight; the backward
pass multiplies it by the row's cotangent, so weights may depend on the losses. The head is frozen and gets no gradient.
Where it is split by vocabulary, each device computes the logits of its part (ops/vocabulary_axis.py).

Shape letters: B batch, R rows, C rows of a chunk, D width, V vocabulary, or a device's part of it.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from flaxdraft.devices.per_device import per_device
from flaxdraft.devices.sharding import gradient_spec, partitions_of, spec_of
from flaxdraft.ops import vocabulary_axis
from flaxdraft.ops.row_chunks import in_chunks


class Logits(NamedTuple):
    """What is made of states and head before the softmax: multiplier * product, or cap * tanh of that / cap."""

    multiplier: float = 1.0
    cap: float | None = None

    def of(self, product: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        scaled = product if self.multiplier == 1 else product * self.multiplier
        return scaled if self.cap is None else self.cap * jnp.tanh(scaled / self.cap)

    def slope(self, logits: Float[Array, "*shape"]) -> Float[Array, "*shape"] | float:
        """The derivative of each logit by its product."""
        return self.multiplier * (1.0 if self.cap is None else 1 - jnp.square(logits / self.cap))


class How(NamedTuple):
    """What stays the same from call to call."""

    chunk: int  # rows whose logits exist at a time
    logits: Logits = Logits()


class Scored(NamedTuple):
    """What is known of each row that was asked; 0 and False elsewhere."""

    loss_BR: Float[Array, "B R"]  # -log of the label's probability, at least float32
    hit_BR: Bool[Array, "B R"]  # the label has the highest logit, the first of several


def cross_entropy(
    how: How,
    states_BRD: Float[Array, "B R D"],
    head_VD: Float[Array, "V D"],
    label_BR: Int[Array, "B R"],
    asked_BR: Bool[Array, "B R"],
) -> Scored:
    """Losses and hits of the rows that are asked.

    Args:
        states_BRD: the head's input, in the precision of the products.
        head_VD: frozen.
    """
    # JAX types a custom_vjp that has options as giving anything.
    return cast(Scored, _scored(how, states_BRD, head_VD, label_BR, asked_BR))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scored(how: How, states, head, label, asked) -> Scored:
    return _walk(how, False, states, head, label, asked)[0]


def _walk(how: How, want_gradient, states, head, label, asked):
    rows_spec, vocabulary = spec_of(states).partitions[:2], partitions_of(spec_of(head))[0]
    out_specs = jax.P(*rows_spec), jax.P(*rows_spec), gradient_spec(states) if want_gradient else ()
    local = partial(_walk_shard, how, vocabulary, want_gradient)
    loss_BR, hit_BR, back = per_device(local, out_specs, states, head, label, asked)
    return Scored(loss_BR, hit_BR), back


def _walk_shard(how: How, axis, want_gradient, states_BRD, head_VD, label_BR, asked_BR):
    one = partial(_rows, how.logits, axis, want_gradient, head_VD=head_VD.astype(states_BRD.dtype))
    (scored, back), _ = in_chunks(lambda rows: (one(*rows), ()), how.chunk, asked_BR, (states_BRD, label_BR))
    if want_gradient and axis is not None:
        back = lax.psum(back, axis)
    return *scored, back


def _rows(logits: Logits, axis, want_gradient, state_CD, label_C, head_VD):
    """Loss, hit, and this device's part of the gradient of each row's loss by its state, of one chunk."""
    wide = jnp.promote_types(state_CD.dtype, jnp.float32)
    logits_CV = logits.of(jnp.einsum("cd,vd->cv", state_CD, head_VD, preferred_element_type=wide))
    scored, logsumexp_C = of_logits(logits_CV, label_C, axis)
    if not want_gradient:
        return scored, ()
    slope_CV = slope_of(logits_CV, logsumexp_C, label_C, axis) * logits.slope(logits_CV)
    back_CD = jnp.einsum("cv,vd->cd", slope_CV.astype(head_VD.dtype), head_VD, preferred_element_type=wide)
    return scored, back_CD.astype(state_CD.dtype)


def of_logits(
    logits_CV: Float[Array, "C V"], label_C: Int[Array, " C"], axis: str | None
) -> tuple[Scored, Float[Array, " C"]]:
    """Losses and hits of some rows, and the logsumexp of each; inside a device, see ops/vocabulary_axis.py."""
    top_C = vocabulary_axis.highest(logits_CV, axis)
    hit_C = vocabulary_axis.first_at(logits_CV, top_C, axis) == label_C
    total_C = vocabulary_axis.total(jnp.sum(jnp.exp(logits_CV - top_C[:, None]), axis=-1), axis)
    logsumexp_C = top_C + jnp.log(total_C)
    return Scored(logsumexp_C - vocabulary_axis.at(logits_CV, label_C, axis), hit_C), logsumexp_C


def slope_of(
    logits_CV: Float[Array, "C V"], logsumexp_C: Float[Array, " C"], label_C: Int[Array, " C"], axis: str | None
) -> Float[Array, "C V"]:
    """The gradient of each row's loss by its logits."""
    num_own = logits_CV.shape[1]
    own_C = label_C if axis is None else label_C - lax.axis_index(axis) * num_own
    right_CV = jnp.arange(num_own)[None] == own_C[:, None]
    return jnp.exp(logits_CV - logsumexp_C[:, None]) - right_CV


def _forward(how, states, head, label, asked):
    return _walk(how, True, states, head, label, asked)


def _backward(how, back_BRD, cotangent):
    return (back_BRD * cotangent.loss_BR[..., None]).astype(back_BRD.dtype), None, None, None


_scored.defvjp(_forward, _backward)
