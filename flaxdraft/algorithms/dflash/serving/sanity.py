"""What is wrong with a draft's directory whatever reads it: one function a question."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from flaxdraft.algorithms.dflash.foreign_fields import unknown_fields
from flaxdraft.algorithms.dflash.serving import tensors
from flaxdraft.algorithms.dflash.serving.fields import malformed, missing
from flaxdraft.algorithms.dflash.serving.kind import DFLASH, Kind
from flaxdraft.algorithms.dflash.serving.terms import CONFIG, INPUT_TAPS, TAPS
from flaxdraft.errors import InputError
from flaxdraft.serving import sanity, vocabulary_tables
from flaxdraft.serving.finding import Finding, few
from flaxdraft.serving.view import DraftView
from flaxdraft.serving.vocabulary_tables import TABLES


def unreadable(view: DraftView, kind: Kind = DFLASH) -> list[Finding]:
    """What makes every further question meaningless."""
    if found := sanity.foreign_form(view):
        return found
    if found := unknown_fields(view.config, kind.projector, kind.own_fields):
        return [Finding("refused", f"config.json has {few(found)}: another drafter of the family, or a switch that "
                        "flaxdraft does not have", "nothing is known of such a draft here")]  # fmt: skip
    bad = [*malformed(view.config), *missing(view.config, kind)]
    return [Finding("refused", f"config.json: {few(bad)}", "write it again")] if bad else []


def shapes(view: DraftView, kind: Kind) -> Iterator[Finding]:
    """Sizes in config.json against the weights."""
    expected = kind.weights(view.config)
    bad = [
        f"{key} {found}, config.json says {expected[name]}"
        for key, found in view.shapes.items()
        if (name := tensors.flat_name(key)) in expected and found != expected[name]
    ]
    if bad:
        yield Finding("refused", f"config.json and weights differ in size: {few(bad)}", "correct config.json")
    if view.twice:
        yield Finding("wrong", f"two files hold {few([*view.twice])}", "remove one of them")


def values(view: DraftView) -> Iterator[Finding]:
    return sanity.values(view, lambda key: tensors.passed_over(view.config, tensors.flat_name(key)))


def vocabulary(view: DraftView) -> Iterator[Finding]:
    """The tables of a draft that does not know every token."""
    size, vocab_size = view.config.get("draft_vocab_size") or view.config["vocab_size"], view.config["vocab_size"]
    tables = {tensors.flat_name(key): view.read(key) for key in view.shapes if tensors.flat_name(key) in TABLES}
    if size == vocab_size and tables:
        yield Finding("note", f"{few([*tables])} beside a whole vocabulary say nothing", "leave them out")
    elif tables or size < vocab_size:
        try:
            vocabulary_tables.take(tables, size, vocab_size, "the weights")
        except InputError as error:
            yield Finding("wrong", str(error), "write offsets, in ascending order of the target's tokens")


def target(view: DraftView) -> Iterator[Finding]:
    """The draft uses the target's embedding and head, so that their sizes must agree."""
    if view.target is None:
        return
    hidden = view.config["hidden_size"]
    for name, ours in (("hidden_size", hidden), ("vocab_size", view.config["vocab_size"])):
        if (theirs := view.target.get(name)) is not None and ours != theirs:
            yield Finding("refused", f"{name} is {ours}, the target's {theirs}", "this draft is for another target")


def mask_token(view: DraftView) -> Iterator[Finding]:
    mask, vocab_size = view.config[CONFIG]["mask_token_id"], view.config["vocab_size"]
    if mask >= vocab_size:
        yield Finding("refused", f"mask_token_id is {mask}, beyond the vocabulary of {vocab_size}",
                      "write the token that the draft was trained with")  # fmt: skip
    ends = (view.target or {}).get("eos_token_id")
    if mask in (ends if isinstance(ends, list) else [ends]):
        yield Finding("note", f"mask_token_id {mask} is a token that ends the target's answers", "check that the "
                      "draft was trained so")  # fmt: skip


def tapped_layers(view: DraftView) -> Iterator[Finding]:
    """Every place lists the same layers, in the order in which engines hand them over."""
    outputs, num_layers = view.config[CONFIG][TAPS], (view.target or {}).get("num_hidden_layers")
    num_layers = num_layers or view.config.get("num_target_layers")
    if sorted(set(outputs)) != outputs:
        yield Finding("wrong", f"{TAPS} {outputs} do not ascend: engines hand the states over in layer order",
                      "write ascending ids, and fc's columns in that order")  # fmt: skip
    elif num_layers is not None and outputs[-1] >= num_layers:
        yield Finding("refused", f"{TAPS} {outputs}: the target has {num_layers} layers, so that the largest id is "
                      f"{num_layers - 1} (outputs, counted from 0); these look counted from 1",
                      "write each less one")  # fmt: skip
    for place in (view.config, view.config[CONFIG]):
        for name in INPUT_TAPS:
            inputs = place.get(name)
            if inputs is not None and [layer - 1 for layer in inputs] != outputs:
                yield Finding("wrong", f"{TAPS} names the outputs of {outputs}, {name} the inputs of {inputs}: "
                              "different states, one layer apart where the numbers are equal",
                              f"write the layers that the draft was trained on in {TAPS}, and no {name}")  # fmt: skip


def block(view: DraftView, kind: Kind) -> Iterator[Finding]:
    top, nested = view.config.get("block_size"), view.config[CONFIG].get("block_size")
    if top is not None and nested is not None and top != nested:
        yield Finding("wrong", f"block_size is {top}, in {CONFIG} {nested}", "write the one of training in both")
    top, nested = view.config.get("is_causal"), view.config[CONFIG].get("causal")
    if top is not None and nested is not None and top != nested:
        yield Finding("wrong", f"is_causal is {top}, {CONFIG}.causal {nested}", "write the one of training in both")
    anchor = view.config.get("sample_from_anchor")
    if anchor is not None and anchor != bool(view.config[CONFIG].get("sample_from_anchor", kind.from_anchor)):
        yield Finding("wrong", f"sample_from_anchor is {anchor} at the top level and not in {CONFIG}: what a slot "
                      "predicts is shifted by one", "write the one of training in both")  # fmt: skip


def layer_types(view: DraftView) -> Iterator[Finding]:
    kinds, count = view.config.get("layer_types"), view.config["num_hidden_layers"]
    if kinds and len(kinds) != count:
        yield Finding("refused", f"layer_types names {len(kinds)} of {count} layers", "name each")
    if "sliding_attention" in (kinds or ()) and view.config.get("sliding_window") is None:
        yield Finding("refused", "layer_types has sliding_attention, and there is no sliding_window", "write it")


def code(view: DraftView) -> Iterator[Finding]:
    if "auto_map" in view.config:
        yield Finding("note", "auto_map names code of another trainer, which engines do not run and which may stop "
                      "them", "leave auto_map out")  # fmt: skip


CONFIG_RULES: tuple[Callable[[DraftView], Iterator[Finding]], ...] = (
    sanity.nulls, sanity.context, sanity.rope, target, mask_token, tapped_layers, layer_types, code,
)  # fmt: skip


def of_directory(view: DraftView, kind: Kind = DFLASH) -> list[Finding]:
    of_config = [finding for rule in (*CONFIG_RULES, *kind.rules) for finding in rule(view)]
    return [*shapes(view, kind), *values(view), *vocabulary(view), *of_config, *block(view, kind)]


def of_sizes(view: DraftView, kind: Kind = DFLASH) -> list[Finding]:
    found: list[Any] = [*shapes(view, kind), *target(view)]
    return found
