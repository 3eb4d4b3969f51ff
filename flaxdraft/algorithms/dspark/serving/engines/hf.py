"""No engine: the directory as SpecForge's classes read it, and this project.

What no engine serves can still be kept in this form and trained further.
"""

from flaxdraft.algorithms.dflash.serving.engines import hf
from flaxdraft.algorithms.dspark.serving.temperatures import NAME, temperatures
from flaxdraft.algorithms.dspark.serving.terms import Engine
from flaxdraft.serving.contract import like

ENGINE = like(hf.ENGINE, Engine, architecture="DSparkDraftModel", files={NAME: temperatures})
