"""The terms in which engines say what serving the heads needs."""

from __future__ import annotations

import dataclasses

from flaxdraft.algorithms.dflash.serving import terms
from flaxdraft.algorithms.dspark.sizes import HEAD_TYPES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine(terms.Engine):
    """What one engine reads."""

    head_types: tuple[str, ...] = HEAD_TYPES  # of the Markov head, that it has
    nested_anchor: bool = True  # dflash_config may hold sample_from_anchor: true
    top_level: bool = False  # it reads the heads' fields at the top level of config.json alone
