"""SGLang (srt/models/dflash.py, srt/speculative/domino_utils.py), since 0.5.20; on CUDA, drafting greedily alone."""

from flaxdraft.algorithms.dflash.serving.engines import sglang
from flaxdraft.algorithms.domino.serving.terms import Engine
from flaxdraft.serving.contract import like

ENGINE = like(sglang.ENGINE, Engine, prefix=1, plain_logits=True, narrow=True)
