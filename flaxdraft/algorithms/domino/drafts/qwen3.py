"""Qwen3-like layers: grouped-query attention with a norm over each query and key head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

from flaxdraft.algorithms.dflash.drafts import qwen3
from flaxdraft.algorithms.dflash.foreign_fields import of_algorithm
from flaxdraft.algorithms.domino.draft import DominoDraft
from flaxdraft.algorithms.domino.names import head_names
from flaxdraft.algorithms.domino.sizes import ARCHITECTURES as ARCHITECTURES
from flaxdraft.algorithms.domino.sizes import PROJECTOR, DominoSizes

MODEL_TYPES = ()


def claims(config: Mapping[str, Any]) -> bool:
    """Whether a config.json of the architecture name that all drafts share is of Domino and has this attention."""
    return of_algorithm(config, PROJECTOR) and qwen3.describes(config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(DominoSizes, qwen3.Config):
    """Sizes of a draft."""


def name_table(config: Config):
    """(JAX path, PyTorch key, transform) of what is trained."""
    return (*qwen3.name_table(config), *head_names())


make = partial(qwen3.make, draft=DominoDraft)
