"""How a DFlash draft's tensors are called, fused and passed over by other trainers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxdraft.algorithms.dflash.serving import tensors
from flaxdraft.serving.foreign.names import OF_THE_TARGET, Layout
from flaxdraft.serving.vocabulary_tables import TABLES

_HEADS = ("prefix_gru.", "embed_proj.", "markov_head.", "confidence_head.", "candidate_selector.", "logit_head.")


def layout_of(config: Mapping[str, Any]) -> Layout:
    """The tensors of the draft that a config.json in the engines' form describes."""
    left_out, fused = dict(OF_THE_TARGET), {}
    if not tensors.is_reduced(config):
        left_out["lm_head.weight"] = "the target's head stands in its place, as in every engine"
        left_out |= dict.fromkeys(TABLES, "the draft knows every token")
    for i in range(config["num_hidden_layers"]):
        attention, mlp = f"layers.{i}.self_attn.", f"layers.{i}.mlp."
        for kind in ("weight", "bias"):
            fused[f"{attention}qkv_proj.{kind}"] = [f"{attention}{p}_proj.{kind}" for p in "qkv"]
        fused[f"{mlp}gate_up_proj.weight"] = [f"{mlp}{p}_proj.weight" for p in ("gate", "up")]
    return Layout(
        shapes=tensors.weights(config), tables=TABLES if tensors.is_reduced(config) else (),
        flat_name=tensors.flat_name, buffers=tensors.BUFFERS, fused=fused, left_out=left_out, stranger=_stranger,
    )  # fmt: skip


def _stranger(name: str) -> str:
    if name.startswith(_HEADS) or "_conv." in name:
        return "another drafter of the family, whose parts a DFlash draft does not have"
    if name.startswith("layers."):
        return "a weight that such a layer does not have, or of a layer more than num_hidden_layers says"
    return "an unknown name; it would have been lost"
