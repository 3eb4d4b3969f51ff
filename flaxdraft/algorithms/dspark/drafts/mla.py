"""Layers with multi-head latent attention, which no released engine serves; see `algorithms/dflash/drafts/mla.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from flaxdraft.algorithms.dflash.drafts import mla
from flaxdraft.algorithms.dspark.draft import DSparkDraft
from flaxdraft.algorithms.dspark.names import head_names
from flaxdraft.algorithms.dspark.sizes import ARCHITECTURES as ARCHITECTURES
from flaxdraft.algorithms.dspark.sizes import DSparkSizes
from flaxdraft.devices.sharding import Sharding
from flaxdraft.interfaces import EmbeddingAndHead, VocabMap
from flaxdraft.nn.precision import Precision

MODEL_TYPES = ()


def claims(config: Mapping[str, Any]) -> bool:
    """Whether a config.json of the architecture names that all drafts share has this attention."""
    return mla.describes(config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(DSparkSizes, mla.Config):
    """Sizes of a draft."""


def name_table(config: Config):
    """(JAX path, PyTorch key, transform) of what is trained."""
    return (*mla.name_table(config), *head_names(config))


def make(
    config: Config, vocab: VocabMap, target: EmbeddingAndHead, *, precision: Precision, sharding: Sharding,
    rngs: nnx.Rngs,
) -> DSparkDraft:  # fmt: skip
    """A draft with fresh weights; see `DSparkDraft`."""
    of_layers = mla.attentions(config, precision, sharding, rngs)
    return DSparkDraft(config, of_layers, vocab, target, precision=precision, sharding=sharding, rngs=rngs)
