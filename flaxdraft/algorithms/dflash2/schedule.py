"""How much the selector's loss counts."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flaxdraft.algorithms.dflash2.settings import Settings


def selector_share(settings: Settings, step: Int[Array, ""]) -> Float[Array, ""]:
    """0 in the warm-up; the step behind it has the first part of the ramp already (SpecForge's rule). Steps count from
    0. Outside a run, whose number of steps is not known, the loss counts in full."""
    warmup, ramp = settings.selector_warmup_steps or 0, settings.selector_ramp_steps or 0
    return settings.selector_alpha * jnp.clip((step - warmup + 1) / max(ramp, 1), 0, 1).astype(jnp.float32)
