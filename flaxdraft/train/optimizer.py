"""AdamW or Muon, clipped by the global norm, on a schedule. Moments are float32, like the master weights."""

from __future__ import annotations

import jax
import optax

from flaxdraft.config import TrainConfig


def schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warmup to the peak, then one of: cosine to final_lr_ratio of it; constant; constant and over the last
    decay_ratio of all steps linearly down to final_lr_ratio (warmup, stable, decay: arXiv 2404.06395)."""
    peak, warmup = config.learning_rate, max(round(config.warmup_ratio * config.num_steps), 1)
    last = max(config.num_steps, warmup + 1)
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, last, peak * config.final_lr_ratio)
    parts, ends = [optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak)], [warmup]
    if config.schedule == "wsd":
        decay = min(max(round(config.decay_ratio * config.num_steps), 1), last - warmup)
        parts.append(optax.linear_schedule(peak, peak * config.final_lr_ratio, decay))
        ends.append(last - decay)
    return optax.join_schedules(parts, ends)


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Weight decay is for matrices alone: norm scales stay free."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule(config), *config.betas, eps=config.eps, weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )  # fmt: skip
