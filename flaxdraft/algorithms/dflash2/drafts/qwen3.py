"""Qwen3-like layers: grouped-query attention with a norm over each query and key head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

from flaxdraft.algorithms.dflash.drafts import qwen3
from flaxdraft.algorithms.dflash2.draft import DFlash2Draft
from flaxdraft.algorithms.dflash2.names import own_names
from flaxdraft.algorithms.dflash2.sizes import ARCHITECTURE, DFlash2Sizes

ARCHITECTURES = (ARCHITECTURE,)
MODEL_TYPES = ()


def claims(config: Mapping[str, Any]) -> bool:
    """Whether a config.json of the architecture name that all drafts share has this attention."""
    return qwen3.describes(config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(DFlash2Sizes, qwen3.Config):
    """Sizes of a draft."""


def name_table(config: Config):
    """(JAX path, PyTorch key, transform) of what is trained."""
    return (*qwen3.name_table(config), *own_names(config))


make = partial(qwen3.make, draft=DFlash2Draft)
