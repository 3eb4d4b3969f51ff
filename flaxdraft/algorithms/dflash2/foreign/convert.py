"""Another trainer's draft -> a directory that training, evaluation and export take; what is not said here is
DFlash's."""

from __future__ import annotations

from functools import partial

from flaxdraft.algorithms.dflash.foreign import convert as of_blocks
from flaxdraft.algorithms.dflash.foreign.family import Family
from flaxdraft.algorithms.dflash2.serving.kind import DFLASH2, flat_name
from flaxdraft.algorithms.dflash2.sizes import ARCHITECTURE, DFlash2Sizes

OF_SPECULATORS = {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 256, "selector_top_k": 16}

FAMILY = Family(DFLASH2, DFlash2Sizes, ARCHITECTURE, flat_name, OF_SPECULATORS, bidirectional=True)
claims = partial(of_blocks.claims, family=FAMILY)
convert = partial(of_blocks.convert, family=FAMILY)
