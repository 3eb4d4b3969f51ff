"""What drafts of one algorithm bring to an import besides what all drafts of blocks have. An algorithm that builds on
DFlash has a folder `foreign` with a `Family` in it, and the functions of `convert.py` with that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flaxdraft.algorithms.dflash.serving import tensors
from flaxdraft.algorithms.dflash.serving.kind import DFLASH, Kind
from flaxdraft.algorithms.dflash.sizes import SERVING_ARCHITECTURE, BlockSizes

Config = Mapping[str, Any]


class Family(NamedTuple):
    """Drafts of one algorithm as other trainers write them."""

    kind: Kind = DFLASH  # its projector is also what speculators calls them
    sizes: type[BlockSizes] = BlockSizes
    architecture: str = SERVING_ARCHITECTURE  # that config.json is given
    flat_name: Callable[[str], str] = tensors.flat_name
    # The fields of dflash_config that speculators writes at the top level, with its defaults; None: it has no such
    # drafts.
    fields: Config | None = None
    bidirectional: bool = False  # whether slots of its sliding layers see their whole block, where it does not say it
    settled: Callable[[Config], Config] = dict  # puts fields where engines read them


OF_DFLASH = Family(fields={})
