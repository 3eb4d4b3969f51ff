"""Another trainer's draft -> a directory that training, evaluation and export take; what is not said here is
DFlash's."""

from __future__ import annotations

from functools import partial

from flaxdraft.algorithms.dflash.foreign import convert as of_blocks
from flaxdraft.algorithms.dflash.foreign.family import Family
from flaxdraft.algorithms.domino.serving.kind import DOMINO
from flaxdraft.algorithms.domino.sizes import DominoSizes

FAMILY = Family(DOMINO, DominoSizes)
claims = partial(of_blocks.claims, family=FAMILY)
convert = partial(of_blocks.convert, family=FAMILY)
