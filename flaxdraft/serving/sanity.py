"""What is wrong with a draft's directory whatever reads it and whatever its algorithm is: one function a question."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from flaxdraft.serving import rope_fields
from flaxdraft.serving.finding import Finding, few
from flaxdraft.serving.foreign.layers import FORM
from flaxdraft.serving.view import DraftView

WEIGHT_DTYPES = ("bfloat16", "float16", "float32")
SHORT_CONTEXT = 2048  # what trainers write when they mean the length of their rows
MARK = "draft_trainer"  # what an export of this project says of itself


def foreign_form(view: DraftView) -> list[Finding]:
    if FORM not in view.config:
        return []
    return [Finding("refused", "config.json is in the speculators form, which vLLM alone reads",
                    "convert it with tools/convert/from_pytorch.py")]  # fmt: skip


def nulls(view: DraftView) -> Iterator[Finding]:
    found = [name for name, value in view.config.items() if value is None]
    if found:
        yield Finding("note", f"null in config.json: {few(found)}", "leave the fields out")


def values(view: DraftView, passed_over: Callable[[str], Any]) -> Iterator[Finding]:
    """Every weight is finite and of a type that engines load.

    Args:
        passed_over: whether a tensor is no weight.
    """
    bad, kinds = [], {}
    for key, dtype in view.dtypes.items():
        if passed_over(key):
            continue
        kinds.setdefault(dtype, []).append(key)
        if dtype in WEIGHT_DTYPES and not np.isfinite(view.read(key).astype(np.float32)).all():
            bad.append(key)
    if bad:
        yield Finding("wrong", f"NaN or infinity in {few(bad)}", "export from a checkpoint before the loss broke")
    for dtype in kinds.keys() - set(WEIGHT_DTYPES):
        yield Finding("wrong", f"{few(kinds[dtype])} stored as {dtype}", f"write {', '.join(WEIGHT_DTYPES)}")
    said = view.config.get("torch_dtype") or view.config.get("dtype")
    if said is not None and len(kinds) == 1 and said not in kinds:
        yield Finding("note", f"config.json says {said}, the weights are {next(iter(kinds))}", "make them agree")


def context(view: DraftView) -> Iterator[Finding]:
    length = view.config.get("max_position_embeddings")
    target = (view.target or {}).get("max_position_embeddings")
    if length is None:
        yield Finding("wrong", "no max_position_embeddings: readers take 2048", "write the target's")
    elif target is not None and length < target:
        yield Finding("wrong", f"max_position_embeddings is {length}, the target's {target}: positions beyond are "
                      "clamped and acceptance dies there", f"write {target}")  # fmt: skip
    elif target is None and length <= SHORT_CONTEXT:
        yield Finding("note", f"max_position_embeddings is {length}, which some trainers write for the length of "
                      "their rows", "give --target to compare")  # fmt: skip


def rope(view: DraftView) -> Iterator[Finding]:
    """The target's base is what a draft should have been trained with, and nearly always was."""
    if view.target is None:
        if not rope_fields.spoken(view.config):
            yield Finding("note", "no RoPE parameters in either dialect: base 10000", "give --target to compare")
        return
    ours, theirs = rope_fields.parameters(view.config), rope_fields.parameters(view.target)
    if ours["rope_theta"] != theirs["rope_theta"]:
        yield Finding("wrong", f"rope_theta is {ours['rope_theta']:g}, the target's {theirs['rope_theta']:g}",
                      "write the base that the draft was trained with; some trainers use 10000 whatever the config "
                      "says, such a draft keeps it")  # fmt: skip
    elif ours["rope_type"] != theirs["rope_type"]:
        yield Finding("note", f"rope_type is {ours['rope_type']!r}, the target's {theirs['rope_type']!r}",
                      "check that the draft was trained so")  # fmt: skip


def reads_rope(view: DraftView, dialects: tuple[str, ...]) -> bool:
    """Whether a reader of these dialects turns by the type and base that config.json means."""
    meant, read = (rope_fields.parameters(view.config, d) for d in (rope_fields.DIALECTS, dialects))
    return (meant["rope_type"], meant["rope_theta"]) == (read["rope_type"], read["rope_theta"])


def rope_as_read(view: DraftView, dialects: tuple[str, ...], types: tuple[str, ...]) -> Iterator[Finding]:
    """What an engine that reads these dialects and knows these types makes of the rotary embedding."""
    meant, read = (rope_fields.parameters(view.config, d) for d in (rope_fields.DIALECTS, dialects))
    if not reads_rope(view, dialects):
        yield Finding("wrong", f"config.json has no {' nor '.join(dialects)}, so it turns with {read['rope_type']} "
                      f"RoPE of base {read['rope_theta']:g} instead of {meant['rope_type']}, {meant['rope_theta']:g}",
                      "write both dialects (rope_parameters; rope_theta and rope_scaling)")  # fmt: skip
    elif meant["rope_type"] not in types:
        why = ": it stretches the base at every length, training only beyond the window" * (
            meant["rope_type"] == "dynamic"
        )
        yield Finding("wrong", f"rope_type {meant['rope_type']!r} is not what was trained{why}", "train with another")


def yarn(meant: Mapping[str, Any]) -> Iterator[Finding]:
    """What engines ask of YaRN, whose readers differ in their defaults."""
    if "original_max_position_embeddings" not in meant:
        yield Finding("refused", "yarn without original_max_position_embeddings", "write it")
    if "attention_factor" in meant:
        yield Finding("wrong", "it ignores yarn's attention_factor", "train without it")
    if meant.get("truncate") is False:
        yield Finding("note", "yarn's truncate is false: vLLM reads it and SGLang does not", "train without it")
