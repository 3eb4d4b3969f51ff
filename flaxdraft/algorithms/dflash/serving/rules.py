"""An engine's contract applied to a draft: one function a clause, each yielding what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from flaxdraft.algorithms.dflash.serving import tensors
from flaxdraft.algorithms.dflash.serving.kind import DFLASH, Kind
from flaxdraft.algorithms.dflash.serving.terms import CONFIG, TAPS, Engine
from flaxdraft.algorithms.dflash.sizes import SWITCHES, switch
from flaxdraft.plugins import first_architecture
from flaxdraft.serving import rope_fields, sanity
from flaxdraft.serving.finding import Finding, few
from flaxdraft.serving.view import DraftView

_LOGITS = ("output_multiplier", "final_logit_softcapping")
Rule = Callable[[Any, DraftView], Iterator[Finding]]  # the first is an engine's table


def architecture(engine: Engine, view: DraftView) -> Iterator[Finding]:
    named = first_architecture(view.config)
    if engine.refuses is not None:
        yield Finding("refused", engine.refuses, "take an engine that serves such drafts")
    elif named != engine.architecture:
        yield Finding("refused", f"architectures names {named!r}, it knows {engine.architecture}",
                      f'write "architectures": ["{engine.architecture}"]')  # fmt: skip
    if not engine.serves:
        return
    if tensors.is_latent(view.config):
        yield Finding("refused", "it serves no drafts with latent attention, as no released engine does",
                      "train with grouped queries (draft.architecture=qwen3)")  # fmt: skip
    elif view.config.get("model_type") != "qwen3":
        yield Finding("refused", f"model_type is {view.config.get('model_type')!r}, whose configuration lacks what it "
                      "reads", 'write "model_type": "qwen3"')  # fmt: skip


def slots(engine: Engine, view: DraftView) -> Iterator[Finding]:
    """What a slot predicts and sees."""
    nested = view.config[CONFIG]
    if nested.get("sample_from_anchor") and not engine.samples_from_anchor:
        yield Finding("refused", "sample_from_anchor is true: it reads slot k for the token at its own place, the "
                      "draft was trained for the one behind it", "train without sample_from_anchor")  # fmt: skip
    causal = nested.get("causal")
    if causal is not None and view.config.get("is_causal") is None and not engine.nested_causal:
        yield Finding("wrong", f"it does not read {CONFIG}.causal: full layers see their whole block, sliding ones "
                      "what lies before", f'write "is_causal": {str(causal).lower()} at the top level')  # fmt: skip
    if len(set(view.config.get("layer_types") or ())) > 1 and engine.mixed_layers:
        yield Finding("note", "sliding and full layers together need its V2 runner", f"set {engine.mixed_layers}")


def switches(engine: Engine, view: DraftView) -> Iterator[Finding]:
    """Sinks, scales and caps are read in one place."""
    nested = view.config[CONFIG]
    moved = [name for name in SWITCHES if view.config.get(name) is not None and nested.get(name) is None]
    if moved and engine.serves:
        yield Finding("wrong", f"it reads {few(moved)} in {CONFIG} alone, not at the top level",
                      f"write {'it' if len(moved) == 1 else 'them'} there")  # fmt: skip


def logits(engine: Engine, view: DraftView) -> Iterator[Finding]:
    """What scales and caps them. A head that corrects logits is trained on the scaled ones."""
    unread = [name for name in _LOGITS if view.config[CONFIG].get(name) is not None]
    if engine.plain_logits:
        for name in _LOGITS:
            if (found := switch(view.config, name)) != SWITCHES[name]:
                yield Finding("wrong", f"{name} is {found}, which it passes over where the head corrects logits",
                              f"train without {name}")  # fmt: skip
    elif unread and not engine.scales_logits:
        yield Finding("note", f"it does not read {few(unread)}; the likeliest tokens, which it proposes, are the same",
                      "nothing is to be done")  # fmt: skip


def vocabulary(engine: Engine, view: DraftView) -> Iterator[Finding]:
    if tensors.is_reduced(view.config) and not engine.reduced_vocabulary:
        yield Finding("refused", f"draft_vocab_size is {view.config['draft_vocab_size']} of "
                      f"{view.config['vocab_size']}: it knows no drafts of a reduced vocabulary, and takes the "
                      "target's head", "serve it with an engine that does")  # fmt: skip


def tapped_layers(engine: Engine, view: DraftView) -> Iterator[Finding]:
    outputs, num_layers = view.config[CONFIG][TAPS], (view.target or {}).get("num_hidden_layers")
    if num_layers is not None and outputs[-1] == num_layers - 1 and not engine.last_layer:
        yield Finding("refused", f"layer {outputs[-1]} is the target's last, whose output it cannot capture",
                      f"train with layers up to {num_layers - 2} (target.tap_layers)")  # fmt: skip


def rope(engine: Engine, view: DraftView) -> Iterator[Finding]:
    yield from sanity.rope_as_read(view, engine.rope_dialects, engine.rope_types)
    meant = rope_fields.parameters(view.config)
    if meant["rope_type"] == "yarn" and engine.serves and sanity.reads_rope(view, engine.rope_dialects):
        yield from sanity.yarn(meant)


def keys(engine: Engine, view: DraftView, kind: Kind) -> Iterator[Finding]:
    """Names that the engine does not understand, and weights that it lacks for that."""
    expected, taken, strange = kind.weights(view.config), set(), []
    for key in view.shapes:
        name = tensors.flat_name(key) if engine.model_prefix else key
        if name in expected:
            taken.add(name)
        elif not tensors.passed_over(view.config, name):
            strange.append(key)
    if strange:
        yield Finding("wrong", f"it passes over {few(strange)}", "remove what the architecture does not have; a "
                      "trained weight that is not served makes another network")  # fmt: skip
    if missing := [name for name in expected if name not in taken]:
        yield Finding("refused", f"it finds no weights for {few(missing)}", "export the draft again")


CONFIG_RULES: tuple[Rule, ...] = (architecture, slots, switches, logits, vocabulary, tapped_layers, rope)


def of_config(engine: Engine, view: DraftView, more: tuple[Rule, ...] = ()) -> list[Finding]:
    return [finding for rule in (*CONFIG_RULES, *more) for finding in rule(engine, view)]


def of_tensors(engine: Engine, view: DraftView, kind: Kind = DFLASH) -> list[Finding]:
    return [*keys(engine, view, kind)]
