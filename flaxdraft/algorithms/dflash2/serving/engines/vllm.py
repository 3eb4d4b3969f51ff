"""vLLM (model_executor/models/qwen3_dflash2.py), since 0.28.0. It takes its V2 runner for such drafts by itself, scales
and caps the logits of candidates, and knows the whole vocabulary alone."""

import dataclasses

from flaxdraft.algorithms.dflash.serving.engines import vllm
from flaxdraft.algorithms.dflash2.sizes import ARCHITECTURE

ENGINE = dataclasses.replace(
    vllm.ENGINE, architecture=ARCHITECTURE, scales_logits=True, reduced_vocabulary=False, mixed_layers=None
)
