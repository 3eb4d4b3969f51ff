"""How much the selector's loss counts."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flaxdraft.algorithms.dflash2.settings import Settings


def selector_share(settings: Settings, step: Int[Array, ""]) -> Float[Array, ""]:
    """Of a step, from 0: nothing in the warm-up, the first part of the ramp in the step behind it (SpecForge's rule).
    Outside a run, whose number of steps is not known, all of it."""
    warmup, ramp = settings.selector_warmup_steps or 0, settings.selector_ramp_steps or 0
    return settings.selector_alpha * jnp.clip((step - warmup + 1) / max(ramp, 1), 0, 1).astype(jnp.float32)
