"""The draft: DFlash's, with the heads beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flax import nnx

from flaxdraft.algorithms.dflash.draft import BlockDraft
from flaxdraft.algorithms.dspark.head import ConfidenceHead, MarkovHead
from flaxdraft.devices.sharding import Sharding
from flaxdraft.interfaces import EmbeddingAndHead, VocabMap
from flaxdraft.nn.precision import Precision
from flaxdraft.nn.self_attention import Heads


class DSparkDraft(BlockDraft):
    """See `BlockDraft`."""

    def __init__(
        self, config: Any, attentions: Sequence[Heads], vocab: VocabMap, target: EmbeddingAndHead, *,
        precision: Precision, sharding: Sharding, rngs: nnx.Rngs,
    ):  # fmt: skip
        super().__init__(config, attentions, vocab, target, precision=precision, sharding=sharding, rngs=rngs)
        self.markov = MarkovHead(config, precision, sharding, rngs)
        self.confidence = ConfidenceHead(config, precision, sharding, rngs) if config.enable_confidence_head else None
