"""What slots weigh in the loss.

Shape letters: B batch, A blocks, S slots of a block, Q slots that predict.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flaxdraft.algorithms.dflash.layout import Layout
from flaxdraft.algorithms.dflash.settings import Settings
from flaxdraft.algorithms.dflash.sums import BlockSums


def weights(
    settings: Settings, layout: Layout, asked_BAS: Bool[Array, "B A S"], loss_BAS: Float[Array, "B A S"]
) -> Float[Array, "B A S"]:
    """Of each slot's cross entropy; 0 where nothing is asked.

    `decay` falls off along the block. The d-pace objectives (arXiv 2605.18810) weigh by q, the draft's own probability
    of the right token, kept above `dpace_alpha`: with pre the product of q up to a slot, dpace_confidence weighs by
    pre, dpace by the sum of pre over this slot and all after it, dpace_continuation by the quotient of the two. None of
    them has a gradient through its weights.
    """
    asked = asked_BAS.astype(loss_BAS.dtype)
    if settings.objective == "decay":
        return decayed(settings.decay_gamma, layout, asked)
    alpha = settings.dpace_alpha
    probability = jnp.exp(-jax.lax.stop_gradient(loss_BAS))
    q_BAS = jnp.where(asked_BAS, (1 - alpha) * probability + alpha, 1.0)
    if settings.objective == "dpace_continuation":
        return _continuation(asked, q_BAS) * asked
    before_BAS = jnp.cumprod(q_BAS, axis=2)
    if settings.objective == "dpace_confidence":
        return before_BAS * asked
    return jnp.flip(jnp.cumsum(jnp.flip(before_BAS * asked, 2), axis=2), 2) * asked


def decayed(gamma: float | None, layout: Layout, asked_BAS: Float[Array, "B A S"]) -> Float[Array, "B A S"]:
    """1 for the first slot that predicts, and falling off behind it; None: 1 for all. 0 where nothing is asked."""
    if gamma is None:
        return asked_BAS
    behind_S = jnp.maximum(jnp.arange(layout.block_size) - layout.first, 0)
    return asked_BAS * jnp.exp(-behind_S / gamma).astype(asked_BAS.dtype)[None, None]


def _continuation(asked_BAS: Float[Array, "B A S"], q_BAS: Float[Array, "B A S"]) -> Float[Array, "B A S"]:
    """From the last slot to the first, since the products of a long block can be 0 and their quotient undefined."""
    value_BA, values = jnp.zeros_like(q_BAS[:, :, 0]), []
    for slot in reversed(range(q_BAS.shape[2])):
        value_BA = asked_BAS[:, :, slot] + value_BA
        values.append(value_BA)
        value_BA = value_BA * q_BAS[:, :, slot]
    return jnp.stack(values[::-1], axis=2)


def summed(
    settings: Settings, layout: Layout, counted: slice, asked_BAS: Bool[Array, "B A S"],
    loss_BAS: Float[Array, "B A S"], hit_BAS: Bool[Array, "B A S"],
) -> BlockSums:  # fmt: skip
    """The sums of all blocks.

    Args:
        counted: the slots of a block whose tokens are proposed.
    """
    weight_BAS = weights(settings, layout, asked_BAS, loss_BAS)
    found = block_sums(weight_BAS, counted, asked_BAS, loss_BAS, hit_BAS)
    if settings.denominator == "weights":
        return found
    # Rows that fill a batch up hold no block, and are not divided by.
    rows_B = jnp.any(asked_BAS, axis=(1, 2)).astype(weight_BAS.dtype)
    return dataclasses.replace(found, weight=jnp.sum(rows_B))


def block_sums(
    weight_BAS: Float[Array, "B A S"], counted: slice, asked_BAS: Bool[Array, "B A S"],
    loss_BAS: Float[Array, "B A S"], hit_BAS: Bool[Array, "B A S"],
) -> BlockSums:  # fmt: skip
    """The same of given weights, by which the loss is divided."""
    hit_BAQ, asked_BAQ = (hit_BAS & asked_BAS)[:, :, counted], asked_BAS[:, :, counted]
    prefix_BAQ = jnp.cumprod(hit_BAQ, axis=2, dtype=jnp.int32)
    count = lambda x: jnp.sum(x, axis=(0, 1), dtype=jnp.int32)  # noqa: E731
    return BlockSums(
        jnp.sum(weight_BAS * loss_BAS), jnp.sum(weight_BAS),
        count(asked_BAQ), count(hit_BAQ), count(prefix_BAQ), count(jnp.any(asked_BAQ, axis=2)),
    )  # fmt: skip
