"""SGLang (srt/models/dflash.py, DFlash2DraftModel), since 0.5.19; it drafts greedily."""

import dataclasses

from flaxdraft.algorithms.dflash.serving.engines import sglang
from flaxdraft.algorithms.dflash2.sizes import ARCHITECTURE

ENGINE = dataclasses.replace(sglang.ENGINE, architecture=ARCHITECTURE)
