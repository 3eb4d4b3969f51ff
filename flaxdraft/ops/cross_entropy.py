"""Cross entropy with hard labels over a whole vocabulary, in chunks of rows: logits, losses, hits and gradients, all
inside one chunk.

Rows that are asked are compacted on each device and the loop runs ceil(n / chunk) times, so [rows, V] is never held for
all rows. The gradient of each row's loss by its own state is computed in the same pass over the chunks and kept without
a weight; the backward pass multiplies it by the row's cotangent, so weights may depend on the losses. The head is
frozen and gets no gradient. Where it is split by vocabulary, each device computes the logits of its part
(ops/vocabulary_axis.py).

Shape letters: B batch, R rows, M = B R, C rows of a chunk, D width, V vocabulary, or a device's part of it.
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
    (num_batch, num_rows), width = label_BR.shape, states_BRD.shape[-1]
    total, size, wide = num_batch * num_rows, how.chunk, jnp.promote_types(states_BRD.dtype, jnp.float32)
    states_MD, head_VD = states_BRD.reshape(total, width), head_VD.astype(states_BRD.dtype)
    label_M, asked_M = label_BR.ravel(), asked_BR.ravel()
    # Asked rows first, in their order; what fills the last chunk lies past the end, and reads 0.
    order, count = jnp.argsort(~asked_M, stable=True), jnp.sum(asked_M)
    order = jnp.pad(jnp.where(jnp.arange(total) < count, order, total), (0, size), constant_values=total)
    take = lambda x, at: x.at[at].get(mode="fill", fill_value=0)  # noqa: E731

    def one(i, carry):
        at_C = lax.dynamic_slice_in_dim(order, i * size, size)
        rows = take(states_MD, at_C), head_VD, take(label_M, at_C)
        scored, back = _rows(how.logits, axis, want_gradient, *rows)
        place = partial(lax.dynamic_update_slice_in_dim, start_index=i * size, axis=0)
        return jax.tree.map(place, carry, (*scored, back))

    # In the order of the walk, with room for the last chunk to be whole.
    empty = jnp.zeros(total + size, wide), jnp.zeros(total + size, bool)
    back = jnp.zeros((total + size, width), states_MD.dtype) if want_gradient else ()
    walked = lax.fori_loop(0, -(-count // size), one, (*empty, back))
    place_M = jnp.where(asked_M, jnp.cumsum(asked_M) - 1, total + size)
    loss, hit, back = jax.tree.map(lambda x: take(x, place_M).reshape(num_batch, num_rows, *x.shape[1:]), walked)
    if want_gradient and axis is not None:
        back = lax.psum(back, axis)
    return loss, hit, back


def _rows(logits: Logits, axis, want_gradient, state_CD, head_VD, label_C):
    """Loss, hit, and this device's part of the gradient of each row's loss by its state, of one chunk."""
    wide = jnp.promote_types(state_CD.dtype, jnp.float32)
    logits_CV = logits.of(jnp.einsum("cd,vd->cv", state_CD, head_VD, preferred_element_type=wide))
    top_C = vocabulary_axis.highest(logits_CV, axis)
    hit_C = vocabulary_axis.first_at(logits_CV, top_C, axis) == label_C
    total_C = vocabulary_axis.total(jnp.sum(jnp.exp(logits_CV - top_C[:, None]), axis=-1), axis)
    logsumexp_C = top_C + jnp.log(total_C)
    scored = Scored(logsumexp_C - vocabulary_axis.at(logits_CV, label_C, axis), hit_C)
    if not want_gradient:
        return scored, ()
    own_C = label_C if axis is None else label_C - lax.axis_index(axis) * head_VD.shape[0]
    right_CV = jnp.arange(head_VD.shape[0])[None] == own_C[:, None]
    slope_CV = jnp.exp(logits_CV - logsumexp_C[:, None]) - right_CV
    slope_CV = slope_CV * logits.slope(logits_CV)
    back_CD = jnp.einsum("cv,vd->cd", slope_CV.astype(head_VD.dtype), head_VD, preferred_element_type=wide)
    return scored, back_CD.astype(state_CD.dtype)


def _forward(how, states, head, label, asked):
    return _walk(how, True, states, head, label, asked)


def _backward(how, back_BRD, cotangent):
    return (back_BRD * cotangent.loss_BR[..., None]).astype(back_BRD.dtype), None, None, None


_scored.defvjp(_forward, _backward)
