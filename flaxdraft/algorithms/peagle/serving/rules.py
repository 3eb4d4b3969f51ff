"""An engine's contract applied to a draft: one function a clause, each yielding what it finds. What parallel drafts
have in common with sequential ones is asked by EAGLE-3's rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from flaxdraft.algorithms.eagle3.serving import rules
from flaxdraft.algorithms.eagle3.serving.kinds import View
from flaxdraft.algorithms.peagle.serving import tensors
from flaxdraft.algorithms.peagle.serving.terms import Engine
from flaxdraft.serving.finding import Finding, few

Rule = Callable[[Engine, View], Iterator[Finding]]


def keys(engine: Engine, view: View) -> Iterator[Finding]:
    """Names that it does not understand, and weights that it therefore lacks."""
    expected, taken, strange = tensors.weights(view.config, view.kind), set(), []
    known, prefixed = {*expected, *tensors.tables(view.config)}, engine.kinds[view.kind.name].model_prefix
    for key in view.shapes:
        name = None if key.startswith("model.") and not prefixed else tensors.flat_name(key)
        if name in known:
            taken.add(name)
        elif not tensors.BUFFERS.search(key):
            strange.append(key)
    if strange:
        level = "refused" if engine.unknown_key == "refused" else "wrong"
        verb = "it stops at" if level == "refused" else "it passes over"
        yield Finding(level, f"{verb} {few(strange)}", "name weights as `layers.0.*`, without `model.`, and remove "
                      "what the architecture does not have")  # fmt: skip
    missing = [name for name in expected if name not in taken]
    if tensors.MASK_STATE in missing:
        yield Finding("refused", "there is no mask_hidden, the state that is read at masked places: not a draft that "
                      "was trained to propose in one pass", "export the draft again")  # fmt: skip
    if "embed_tokens.weight" in missing:
        yield Finding("wrong", "without embed_tokens.weight it takes the target's embedding, in which nobody learned "
                      "the mask token", "export the draft again")  # fmt: skip
    if others := [name for name in missing if name not in (tensors.MASK_STATE, "embed_tokens.weight")]:
        yield Finding("wrong", f"it finds no weights and serves with random values for {few(others)}",
                      "export the draft again")  # fmt: skip


CONFIG_RULES: tuple[Rule, ...] = (
    rules.architecture, rules.switches, rules.config_fields, rules.tapped_layers, rules.rope, rules.widths,
)  # fmt: skip
TENSOR_RULES: tuple[Rule, ...] = (keys, rules.vocabulary)


def of_config(engine: Engine, view: View) -> list[Finding]:
    if engine.why_not is not None:
        return [Finding("refused", engine.why_not, "serve it with vLLM (export.engine=vllm)")]
    return [finding for rule in CONFIG_RULES for finding in rule(engine, view)]


def of_tensors(engine: Engine, view: View) -> list[Finding]:
    return [] if engine.why_not is not None else [finding for rule in TENSOR_RULES for finding in rule(engine, view)]
