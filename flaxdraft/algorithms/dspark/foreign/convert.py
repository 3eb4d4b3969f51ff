"""Another trainer's draft -> a directory that training, evaluation and export take; what is not said here is
DFlash's."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from flaxdraft.algorithms.dflash.foreign import convert as of_blocks
from flaxdraft.algorithms.dflash.foreign.family import Family
from flaxdraft.algorithms.dflash.serving.terms import CONFIG
from flaxdraft.algorithms.dspark.serving.kind import DSPARK, of_head
from flaxdraft.algorithms.dspark.sizes import ARCHITECTURES, PROJECTOR, DSparkSizes, nested

OF_SPECULATORS = {
    "markov_rank": 256, "markov_head_type": "vanilla", "enable_confidence_head": True,
    "confidence_head_with_markov": True,
}  # fmt: skip


def settled(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The heads' fields in both places. SpecForge says that there is a confidence head by what its loss counts."""
    config = nested(config)
    if not isinstance(inner := config.get(CONFIG), Mapping):
        return config  # what is missing is said where it is read
    told = of_head({**config, CONFIG: inner})
    told.setdefault("enable_confidence_head", inner.get("confidence_head_alpha") not in (None, 0))
    return {**config, **told, CONFIG: {**inner, **told, "projector_type": PROJECTOR}}


FAMILY = Family(DSPARK, DSparkSizes, ARCHITECTURES[0], fields=OF_SPECULATORS, settled=settled)
claims = partial(of_blocks.claims, family=FAMILY)
convert = partial(of_blocks.convert, family=FAMILY)
