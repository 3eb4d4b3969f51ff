"""How a P-EAGLE draft's tensors are called, fused and passed over by other trainers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxdraft.algorithms.peagle.drafts.llama import SERVING
from flaxdraft.algorithms.peagle.serving import tensors
from flaxdraft.serving.foreign.names import OF_THE_TARGET, Layout, fused_projections
from flaxdraft.serving.vocabulary_tables import TABLES


def layout_of(config: Mapping[str, Any]) -> Layout:
    """Of the draft that a config.json in the engines' form describes."""
    fused = fused_projections(config["num_hidden_layers"])
    return Layout(
        shapes=tensors.weights(config, SERVING), tables=TABLES, flat_name=tensors.flat_name, buffers=tensors.BUFFERS,
        fused=fused, left_out=OF_THE_TARGET, stranger=_stranger,
    )  # fmt: skip


def _stranger(name: str) -> str:
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return "a Qwen3 layer with norms over each head; parallel drafts here have Llama layers"
    if name == "input_norm.weight":
        return "that of norm_before_fc, which config.json does not name"
    if name.startswith("layers."):
        return "a weight that such a layer does not have, or of a layer more than num_hidden_layers says"
    return "an unknown name; it would have been lost"
