"""How much the loss of the uncorrected logits counts."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flaxdraft.algorithms.domino.settings import Settings


def base_share(settings: Settings, step: Int[Array, ""]) -> Float[Array, ""]:
    """It falls along a line; steps count from 0. Outside a run, whose number of steps is not known, it is 0."""
    if settings.base_steps is None:
        return jnp.zeros(())
    return jnp.clip(settings.base_start * (1 - jnp.minimum(step / settings.base_steps, 1)), 0, 1)
