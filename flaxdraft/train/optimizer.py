"""AdamW with warmup and cosine, clipped by the global norm. Moments are float32, like the master weights."""

from __future__ import annotations

import jax
import optax

from flaxdraft.config import TrainConfig


def schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warmup to the peak, cosine to final_lr_ratio of it."""
    warmup = max(round(config.warmup_ratio * config.num_steps), 1)
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(config.num_steps, warmup + 1),
        config.learning_rate * config.final_lr_ratio,
    )  # fmt: skip


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Weight decay is for matrices alone: norm scales stay free."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule(config), *config.betas, weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )  # fmt: skip
