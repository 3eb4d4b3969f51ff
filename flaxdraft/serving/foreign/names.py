"""Every tensor of another trainer's checkpoint: renamed, split, left out for a reason, or an error."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flaxdraft.errors import InputError
from flaxdraft.serving.finding import few

# Wrappers of modules that end up in front of every key; all are taken off, in any order.
_WRAPPERS = ("module.", "_orig_mod.", "draft_model.", "model.")
# What training needed beside the draft.
OF_THE_TARGET = {
    "embed_tokens.weight": "the target's embedding stands in its place, as in every engine",
    "verifier_lm_head.weight": "the target's head, which training needed",
    "verifier_norm.weight": "the target's final norm, which training needed",
    "target_lm_head.weight": "the target's head, which training needed",
}


class Row(NamedTuple):
    """What became of one key."""

    key: str
    became: str  # new names, or "" where it was left out
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The tensors of an algorithm's drafts, by their flat names."""

    shapes: Mapping[str, tuple[int, ...]]  # of weights
    tables: Collection[str]  # that stand beside them
    flat_name: Callable[[str], str]  # of a key without wrappers
    buffers: re.Pattern[str]  # that say what config.json says
    fused: Mapping[str, Sequence[str]]  # the projections that one of that name holds, row after row
    left_out: Mapping[str, str]  # the reason, by name
    stranger: Callable[[str], str]  # what a name may be of which nothing is known


def fused_projections(num_layers: int) -> dict[str, list[str]]:
    """What holds the rows of several projections, in layers of grouped-query attention."""
    fused = {}
    for i in range(num_layers):
        attention, mlp = f"layers.{i}.self_attn.", f"layers.{i}.mlp."
        for kind in ("weight", "bias"):
            fused[f"{attention}qkv_proj.{kind}"] = [f"{attention}{p}_proj.{kind}" for p in "qkv"]
        fused[f"{mlp}gate_up_proj.weight"] = [f"{mlp}{p}_proj.weight" for p in ("gate", "up")]
    return fused


def unwrapped(key: str, flat_name: Callable[[str], str]) -> str:
    """The flat name behind wrappers and prefixes."""
    while wrapper := next((w for w in _WRAPPERS if key.startswith(w)), None):
        key = key.removeprefix(wrapper)
    return flat_name(key)


def rename(
    tensors: Mapping[str, np.ndarray], layout: Layout, origin: str
) -> tuple[dict[str, np.ndarray], list[Row]]:  # fmt: skip
    """The weights under flat names, the tables among them, and one row a key.

    Raises:
        InputError: keys that nothing is known of, a few of each sort, or two that mean the same.
    """
    wanted = {*layout.shapes, *layout.tables}
    out: dict[str, np.ndarray] = {}
    rows, problems, strangers = [], [], {}
    for key, array in tensors.items():
        name = unwrapped(key, layout.flat_name)
        parts = {name: array} if name in wanted else _split(name, array, layout)
        if layout.buffers.search(name):
            rows.append(Row(key, "", "a buffer; config.json says the same"))
        elif parts:
            problems += [f"{key} is the second tensor that means {part}" for part in parts if part in out]
            out |= parts
            rows.append(Row(key, ", ".join(parts), "" if len(parts) == 1 else "fused, split"))
        elif name in layout.left_out:
            rows.append(Row(key, "", layout.left_out[name]))
        elif name.endswith(".bias") and not np.any(array):
            rows.append(Row(key, "", "a bias of zeros"))
        else:
            strangers.setdefault(layout.stranger(name), []).append(key)
    problems += [f"{few(keys)}: {what}" for what, keys in strangers.items()]
    if problems:
        raise InputError(f"{origin}: {'; '.join(problems[:8])}{' ...' if len(problems) > 8 else ''}")
    return out, rows


def _split(name: str, array: np.ndarray, layout: Layout) -> dict[str, np.ndarray]:
    """The projections that a fused one holds; empty where the name is not that of one, or the rows do not add up."""
    parts = layout.fused.get(name, ())
    if not parts or not all(part in layout.shapes for part in parts):
        return {}
    sizes = [layout.shapes[part][0] for part in parts]
    if array.shape[0] != sum(sizes):
        return {}
    return dict(zip(parts, np.split(array, np.cumsum(sizes)[:-1]), strict=True))
