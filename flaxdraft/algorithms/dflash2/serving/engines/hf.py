"""No engine: the directory as SpecForge's and z-lab's classes read it, and this project.

What no engine serves can still be kept in this form and trained further.
"""

import dataclasses

from flaxdraft.algorithms.dflash.serving.engines import hf
from flaxdraft.algorithms.dflash2.sizes import ARCHITECTURE

ENGINE = dataclasses.replace(hf.ENGINE, architecture=ARCHITECTURE)
