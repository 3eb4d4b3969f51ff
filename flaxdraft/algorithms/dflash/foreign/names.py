"""How the tensors of a draft of blocks are called, fused and passed over by other trainers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxdraft.algorithms.dflash.foreign.family import Family
from flaxdraft.algorithms.dflash.serving import tensors
from flaxdraft.serving.foreign.names import OF_THE_TARGET, Layout, fused_projections
from flaxdraft.serving.vocabulary_tables import TABLES

_HEADS = ("prefix_gru.", "embed_proj.", "markov_head.", "confidence_head.", "candidate_selector.", "logit_head.")


def layout_of(config: Mapping[str, Any], family: Family) -> Layout:
    """The tensors of the draft that a config.json in the engines' form describes."""
    left_out = dict(OF_THE_TARGET)
    if not tensors.is_reduced(config):
        left_out["lm_head.weight"] = "the target's head stands in its place, as in every engine"
        left_out |= dict.fromkeys(TABLES, "the draft knows every token")
    return Layout(
        shapes=family.kind.weights(config), tables=TABLES if tensors.is_reduced(config) else (),
        flat_name=family.flat_name, buffers=tensors.BUFFERS, fused=fused_projections(config["num_hidden_layers"]),
        left_out=left_out, stranger=_stranger,
    )  # fmt: skip


def _stranger(name: str) -> str:
    if name.startswith(_HEADS) or "_conv." in name:
        return "another drafter of the family, whose parts such a draft does not have"
    if name.startswith("layers."):
        return "a weight that such a layer does not have, or of a layer more than num_hidden_layers says"
    return "an unknown name; it would have been lost"
