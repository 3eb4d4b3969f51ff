"""Every tensor of another trainer's checkpoint: renamed, split, left out for a reason, or an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from flaxdraft.algorithms.eagle3.serving.kinds import kind_of
from flaxdraft.algorithms.eagle3.serving.tensors import ATTENTION, BUFFERS, LAYER, flat_name, weights
from flaxdraft.algorithms.eagle3.serving.terms import Shapes
from flaxdraft.errors import InputError

# Wrappers of modules that end up in front of every key; all are taken off, in any order.
_WRAPPERS = ("module.", "_orig_mod.", "draft_model.", "model.")
_LEFT_OUT = {
    "embed_tokens.weight": "the target's embedding stands in its place, as in every engine",
    "verifier_lm_head.weight": "the target's head, which training needed",
    "verifier_norm.weight": "the target's final norm, which training needed",
    "target_lm_head.weight": "the target's head, which training needed",
}
_STRANGERS = {
    "mask_hidden": "a parallel-drafting (P-EAGLE) draft, whose directory of safetensors draft.init_from takes as it is",
    ATTENTION + "q_norm.weight": "a Qwen3 layer with norms over each head, which no draft of this project has",
    ATTENTION + "k_norm.weight": "a Qwen3 layer with norms over each head, which no draft of this project has",
    "input_norm.weight": "that of norm_before_fc, which config.json does not name",
}


class Row(NamedTuple):
    """What became of one key."""

    key: str
    became: str  # new names, or "" where it was left out
    reason: str


def unwrapped(key: str) -> str:
    """The flat name behind wrappers and prefixes."""
    while wrapper := next((w for w in _WRAPPERS if key.startswith(w)), None):
        key = key.removeprefix(wrapper)
    return flat_name(key)


def rename(
    tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], origin: str
) -> tuple[dict[str, np.ndarray], list[Row]]:
    """The weights under flat names, the vocabulary tables among them, and one row a key.

    Raises:
        InputError: keys that nothing is known of, or two that mean the same; all are listed.
    """
    shapes = weights(config, kind_of(config))
    wanted = {*shapes, "d2t", "t2d"}
    out: dict[str, np.ndarray] = {}
    rows, problems = [], []
    for key, array in tensors.items():
        name = unwrapped(key)
        parts = {name: array} if name in wanted else _split(name, array, shapes)
        if BUFFERS.search(name):
            rows.append(Row(key, "", "a buffer; config.json says the same"))
        elif parts:
            problems += [f"{key} is the second tensor that means {part}" for part in parts if part in out]
            out |= parts
            rows.append(Row(key, ", ".join(parts), "" if len(parts) == 1 else "fused, split"))
        elif name in _LEFT_OUT:
            rows.append(Row(key, "", _LEFT_OUT[name]))
        elif name.endswith(".bias") and not np.any(array):
            rows.append(Row(key, "", "a bias of zeros"))
        else:
            problems.append(f"{key}: {_stranger(name)}")
    if problems:
        raise InputError(f"{origin}: {'; '.join(problems[:8])}{' ...' if len(problems) > 8 else ''}")
    return out, rows


def _split(name: str, array: np.ndarray, shapes: Shapes) -> dict[str, np.ndarray]:
    """The projections that a fused one holds, by rows; empty where the name is not that of one, or the rows do not
    add up."""
    for fused, parts in (
        (ATTENTION + "qkv_proj.weight", [ATTENTION + f"{p}_proj.weight" for p in "qkv"]),
        (LAYER + "mlp.gate_up_proj.weight", [LAYER + f"mlp.{p}_proj.weight" for p in ("gate", "up")]),
        (ATTENTION + "fused_qkv_a_proj.weight", _QKV_A),
        (ATTENTION + "fused_qkv_a_proj_with_mqa.weight", _QKV_A),
    ):
        if name == fused and all(part in shapes for part in parts):
            sizes = [shapes[part][0] for part in parts]
            if array.shape[0] == sum(sizes):
                return dict(zip(parts, np.split(array, np.cumsum(sizes)[:-1]), strict=True))
    return {}


_QKV_A = [ATTENTION + "q_a_proj.weight", ATTENTION + "kv_a_proj_with_mqa.weight"]


def _stranger(name: str) -> str:
    if name.startswith("layers."):
        return "a second layer; drafts here have one"
    if name.endswith(".bias"):
        return "a bias that is not zero; engines load no biases"
    return _STRANGERS.get(name, "an unknown name; it would have been lost")
