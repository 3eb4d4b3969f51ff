"""An engine's contract applied to a draft: one function a clause, each yielding what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from flaxdraft.algorithms.dflash.serving import tensors
from flaxdraft.algorithms.dflash.serving.terms import CONFIG, TAPS, Engine
from flaxdraft.algorithms.dflash.sizes import SERVING_ARCHITECTURE
from flaxdraft.plugins import first_architecture
from flaxdraft.serving import rope_fields, sanity
from flaxdraft.serving.finding import Finding, few
from flaxdraft.serving.view import DraftView

Rule = Callable[[Engine, DraftView], Iterator[Finding]]


def architecture(engine: Engine, view: DraftView) -> Iterator[Finding]:
    named = first_architecture(view.config)
    if named != SERVING_ARCHITECTURE:
        yield Finding("refused", f"architectures names {named!r}, it knows {SERVING_ARCHITECTURE}",
                      f'write "architectures": ["{SERVING_ARCHITECTURE}"]')  # fmt: skip
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


def keys(engine: Engine, view: DraftView) -> Iterator[Finding]:
    """Names that it does not understand, and weights that it therefore lacks."""
    expected, taken, strange = tensors.weights(view.config), set(), []
    for key in view.shapes:
        name = tensors.flat_name(key) if engine.model_prefix else key
        if name in expected:
            taken.add(name)
        elif not tensors.PASSED_OVER.search(name):
            strange.append(key)
    if strange:
        yield Finding("wrong", f"it passes over {few(strange)}", "remove what the architecture does not have; a "
                      "trained weight that is not served makes another network")  # fmt: skip
    if missing := [name for name in expected if name not in taken]:
        yield Finding("refused", f"it finds no weights for {few(missing)}", "export the draft again")


CONFIG_RULES: tuple[Rule, ...] = (architecture, slots, tapped_layers, rope)


def of_config(engine: Engine, view: DraftView) -> list[Finding]:
    return [finding for rule in CONFIG_RULES for finding in rule(engine, view)]


def of_tensors(engine: Engine, view: DraftView) -> list[Finding]:
    return [*keys(engine, view)]
