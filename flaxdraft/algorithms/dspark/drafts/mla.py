"""Layers with multi-head latent attention, which no released engine serves; see `algorithms/dflash/drafts/mla.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

from flaxdraft.algorithms.dflash.drafts import mla
from flaxdraft.algorithms.dspark.draft import DSparkDraft
from flaxdraft.algorithms.dspark.names import head_names
from flaxdraft.algorithms.dspark.sizes import ARCHITECTURES as ARCHITECTURES
from flaxdraft.algorithms.dspark.sizes import DSparkSizes

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


make = partial(mla.make, draft=DSparkDraft)
