"""How an EAGLE-3 draft's tensors are called, fused and passed over by other trainers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxdraft.algorithms.eagle3.serving.kinds import kind_of
from flaxdraft.algorithms.eagle3.serving.tensors import ATTENTION, BUFFERS, LAYER, flat_name, weights
from flaxdraft.serving.foreign.names import OF_THE_TARGET, Layout

_HEAD_NORM = "a Qwen3 layer with norms over each head, whose config.json would name Eagle3Qwen3ForCausalLM"
_STRANGERS = {
    "mask_hidden": "a parallel-drafting (P-EAGLE) draft, whose config.json would name a mask_token_id",
    ATTENTION + "q_norm.weight": _HEAD_NORM,
    ATTENTION + "k_norm.weight": _HEAD_NORM,
    "input_norm.weight": "that of norm_before_fc, which config.json does not name",
}
_QKV_A = [ATTENTION + "q_a_proj.weight", ATTENTION + "kv_a_proj_with_mqa.weight"]
_FUSED = {
    ATTENTION + "qkv_proj.weight": [ATTENTION + f"{p}_proj.weight" for p in "qkv"],
    LAYER + "mlp.gate_up_proj.weight": [LAYER + f"mlp.{p}_proj.weight" for p in ("gate", "up")],
    ATTENTION + "fused_qkv_a_proj.weight": _QKV_A,
    ATTENTION + "fused_qkv_a_proj_with_mqa.weight": _QKV_A,
}  # fmt: skip


def layout_of(config: Mapping[str, Any]) -> Layout:
    """Of the draft that a config.json in the engines' form describes."""
    return Layout(
        shapes=weights(config, kind_of(config)), tables=("d2t", "t2d"), flat_name=flat_name, buffers=BUFFERS,
        fused=_FUSED, left_out=OF_THE_TARGET, stranger=_stranger,
    )  # fmt: skip


def _stranger(name: str) -> str:
    if name.startswith("layers."):
        return "a second layer; drafts here have one"
    if name.endswith(".bias"):
        return "a bias that is not zero; engines load no biases"
    return _STRANGERS.get(name, "an unknown name; it would have been lost")
