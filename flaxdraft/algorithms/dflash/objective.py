"""What slots weigh in the loss.

Shape letters: B batch, A blocks, S slots of a block, Q slots that predict.
"""

from __future__ import annotations

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
        if settings.decay_gamma is None:
            return asked
        behind_S = jnp.maximum(jnp.arange(layout.block_size) - layout.first, 0)
        return asked * jnp.exp(-behind_S / settings.decay_gamma).astype(asked.dtype)[None, None]
    alpha = settings.dpace_alpha
    probability = jnp.exp(-jax.lax.stop_gradient(loss_BAS))
    before_BAS = jnp.cumprod(jnp.where(asked_BAS, (1 - alpha) * probability + alpha, 1.0), axis=2)
    after_BAS = jnp.flip(jnp.cumsum(jnp.flip(before_BAS * asked, 2), axis=2), 2)
    chosen = {"dpace": after_BAS, "dpace_confidence": before_BAS, "dpace_continuation": after_BAS / before_BAS}
    return chosen[settings.objective] * asked


def summed(
    settings: Settings, layout: Layout, num_predicted: int, asked_BAS: Bool[Array, "B A S"],
    loss_BAS: Float[Array, "B A S"], hit_BAS: Bool[Array, "B A S"],
) -> BlockSums:  # fmt: skip
    """The sums of all blocks.

    Args:
        num_predicted: slots that are counted, from the first that predicts.
    """
    weight_BAS = weights(settings, layout, asked_BAS, loss_BAS)
    by_rows = settings.denominator == "rows"
    counted = slice(layout.first, layout.first + num_predicted)
    hit_BAQ, asked_BAQ = (hit_BAS & asked_BAS)[:, :, counted], asked_BAS[:, :, counted]
    prefix_BAQ = jnp.cumprod(hit_BAQ, axis=2, dtype=jnp.int32)
    count = lambda x: jnp.sum(x, axis=(0, 1), dtype=jnp.int32)  # noqa: E731
    return BlockSums(
        jnp.sum(weight_BAS * loss_BAS),
        jnp.sum(jnp.ones_like(weight_BAS[:, 0, 0])) if by_rows else jnp.sum(weight_BAS),
        count(asked_BAQ), count(hit_BAQ), count(prefix_BAQ), count(jnp.any(asked_BAQ, axis=2)),
    )  # fmt: skip
