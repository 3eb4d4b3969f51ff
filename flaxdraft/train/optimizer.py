"""AdamW or Muon, clipped by the global norm, on a schedule. Moments are float32, like the master weights."""

from __future__ import annotations

from typing import Any

import jax
import optax
import optax.contrib
from flax import nnx

from flaxdraft.config import TrainConfig
from flaxdraft.devices.sharding import spec_of
from flaxdraft.nn.layers import Kept


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
    """Weight decay is for trained matrices alone: norm scales stay free."""
    rate = schedule(config)
    adamw = optax.adamw(
        rate, *config.betas, eps=config.eps, weight_decay=config.weight_decay,
        mask=_decays,
    )  # fmt: skip
    if config.optimizer == "muon":
        # Updates as large as AdamW's (arXiv 2502.16982), so that one rate and one decay do for both kinds.
        muon = optax.contrib.muon(rate, weight_decay=config.weight_decay, consistent_rms=0.2)
        adamw = _placed_by_xla(optax.partition({"muon": muon, "adamw": adamw}, _muon_or_adamw))
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def _decays(params: Any) -> Any:
    """Of each array."""

    def of_variable(variable):
        return jax.tree.map(lambda p: p.ndim > 1 and not isinstance(variable, Kept), variable)

    return jax.tree.map(of_variable, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _muon_or_adamw(params: Any) -> Any:
    """Muon is for matrices that map states to states: not for the head, an embedding, or a vector, and nothing of more
    axes is such a matrix (optax gives it to an Adam of its own, which knows nothing of the configuration)."""

    def label(path, param):
        name = jax.tree_util.keystr(path)
        return "adamw" if param.ndim != 2 or "lm_head" in name or "embed_tokens" in name else "muon"

    return jax.tree_util.tree_map_with_path(label, params)


def _placed_by_xla(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same transformation of arrays on a mesh: it multiplies matrices by themselves, and XLA chooses how to share
    that out; what comes back lies where it lay."""

    def update(updates, state, params=None):
        if jax.sharding.get_abstract_mesh().empty:
            return inner.update(updates, state, params)
        places = jax.tree.map(spec_of, (updates, state))
        return jax.sharding.auto_axes(out_sharding=places)(inner.update)(updates, state, params)

    return optax.GradientTransformation(inner.init, update)
