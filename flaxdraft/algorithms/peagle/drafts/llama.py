"""Layers with grouped-query attention, as a Llama has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from flaxdraft.algorithms.eagle3.drafts import llama
from flaxdraft.algorithms.peagle.draft import ParallelDraft
from flaxdraft.algorithms.peagle.mask_fields import mask_token_of
from flaxdraft.algorithms.peagle.serving.terms import KIND
from flaxdraft.algorithms.peagle.sizes import ParallelSizes, parallel_names
from flaxdraft.devices.sharding import Sharding
from flaxdraft.interfaces import EmbeddingAndHead, VocabMap
from flaxdraft.nn.gqa import GQA, GQAConfig
from flaxdraft.nn.precision import Precision
from flaxdraft.plugins import first_architecture

SERVING_ARCHITECTURE = "LlamaForCausalLMEagle3"  # vLLM, which tells parallel drafts apart by how it is started
# Names that trainers write: SpecForge, speculators as vLLM reads it, NeMo.
OWN_NAMES = ("PEagleDraftModel", "PeagleLlamaForCausalLM", "LlamaForCausalLMPeagle")
# The others, and the model type, are those of sequential drafts.
ARCHITECTURES = (*OWN_NAMES, *llama.ARCHITECTURES)
MODEL_TYPES = llama.MODEL_TYPES


def claims(config: Mapping[str, Any]) -> bool:
    """Whether a config.json with one of these names is of a parallel draft."""
    return first_architecture(config) in OWN_NAMES or mask_token_of(config) is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ParallelSizes, llama.Config):
    """Sizes of a draft."""

    def to_hf(self) -> dict[str, Any]:
        """config.json fields, without the target's layer ids."""
        return super().to_hf() | {"architectures": [SERVING_ARCHITECTURE]}


def name_table(config: Config):
    """(JAX path, PyTorch key, transform) of what is trained."""
    rows = parallel_names(config)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        rows.append((f"self_attn/{name}/kernel", f"layers.0.self_attn.{name}.weight", "transpose"))
        for i in range(1, config.num_hidden_layers):
            rows.append((f"layer_{i}/self_attn/{name}/kernel", f"layers.{i}.self_attn.{name}.weight", "transpose"))
    return tuple(rows)


def make(
    config: Config, vocab: VocabMap, target: EmbeddingAndHead, *, precision: Precision, sharding: Sharding,
    rngs: nnx.Rngs,
) -> ParallelDraft:  # fmt: skip
    """A draft with fresh weights; see `ParallelDraft`."""
    c = config
    gqa = GQAConfig(c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rope)
    further = [GQA(gqa, c.hidden_size, c.hidden_size, precision, rngs, sharding) for _ in range(1, c.num_hidden_layers)]
    attentions = [llama.attention(c, precision, rngs, sharding), *further]
    return ParallelDraft(c, attentions, vocab, target, precision=precision, sharding=sharding, rngs=rngs)


SERVING = dataclasses.replace(llama.SERVING, name=KIND)  # as engines know it
