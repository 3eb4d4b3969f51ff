"""An engine's contract applied to a draft: one function a clause, each yielding what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from flaxdraft.algorithms.eagle3.serving import layer_ids, tensors
from flaxdraft.algorithms.eagle3.serving.kinds import View
from flaxdraft.algorithms.eagle3.serving.terms import SWITCHES, Engine, switch
from flaxdraft.plugins import first_architecture
from flaxdraft.serving import rope_fields, sanity
from flaxdraft.serving.finding import Finding, few

Rule = Callable[[Engine, View], Iterator[Finding]]


def architecture(engine: Engine, view: View) -> Iterator[Finding]:
    named, served = first_architecture(view.config), engine.kinds.get(view.kind.name)
    if served is None:
        others = " or ".join(name for name in view.kind.engines if name != "hf") or "sglang or vllm"
        yield Finding("refused", f"it serves no {view.kind.name} drafts", f"take an engine that does: {others}")
    elif named not in (names := served.architectures):
        yield Finding("refused", f"architectures names {named!r}, it knows {' and '.join(names)}",
                      f'write "architectures": ["{names[0]}"], or export with --engine for it')  # fmt: skip


def layers(engine: Engine, view: View) -> Iterator[Finding]:
    count = view.config.get("num_hidden_layers") or 1
    if engine.max_layers is not None and count > engine.max_layers:
        yield Finding("refused", f"num_hidden_layers is {count}, it builds {engine.max_layers}", "train one layer")
    elif count > 1:
        yield Finding("wrong", f"{count} layers: SGLang norms the residual stream of the later ones with hidden_norm, "
                      "vLLM with input_layernorm", "train one layer; drafts of several are not portable")  # fmt: skip


def understood(engine: Engine, view: View, key: str) -> str | None:
    """The flat name under which the engine takes a key, None where it does not."""
    if key.startswith("model."):
        served = engine.kinds.get(view.kind.name)
        if served is None or not served.model_prefix:
            return None
        key = key.removeprefix("model.")
    if key.startswith(("midlayer.", "layers.")) and not key.startswith(engine.layer_prefixes):
        return None
    return tensors.flat_name(key)


def keys(engine: Engine, view: View) -> Iterator[Finding]:
    """Names that it does not understand, and weights that it therefore lacks."""
    wanted = tensors.weights(view.config, view.kind)
    known = {*wanted, *tensors.extras(view.config)}
    biases = {f"{tensors.ATTENTION}{p}_proj.bias" for p in "qkv"} if engine.attention_bias else set()
    taken, strange = set(), []
    for key in view.shapes:
        name = understood(engine, view, key)
        if tensors.BUFFERS.search(key):
            continue
        if name in known | biases:
            taken.add(name)
        else:
            strange.append(key)
    if strange:
        verb = {"refused": "it stops at", "skipped": "it passes over", "unread": "it never looks at"}
        bias_only = engine.unknown_key == "refused" and all(key.endswith(".bias") for key in strange)
        level = "refused" if engine.unknown_key == "refused" and not bias_only else "wrong"
        mend = "write them as `midlayer.*` (tools/convert/from_pytorch.py does)"
        if any(tensors.flat_name(key) not in known for key in strange):
            mend = (
                "remove what the architecture does not have; a trained weight that is not served makes another network"
            )
        yield Finding(level, f"{verb['skipped' if bias_only else engine.unknown_key]} {few(strange)}", mend)
    missing = [name for name in wanted if name not in taken and _needs(engine, view, name)]
    if missing:
        effect = {"random": "and serves with random values for", "fails": "and stops without"}[engine.missing_key]
        level = "wrong" if engine.missing_key == "random" else "refused"
        yield Finding(level, f"it finds no weights {effect} {few(missing)}", "export or convert the draft again")


def _needs(engine: Engine, view: View, name: str) -> bool:
    if name == "lm_head.weight" and engine.shares_head:
        _, _, vocab, draft_vocab = tensors.sizes(view.config)
        return draft_vocab != vocab
    return not (name == "embed_tokens.weight" and engine.embedding == "unread")


def embedding(engine: Engine, view: View) -> Iterator[Finding]:
    hidden, target_hidden, _, _ = tensors.sizes(view.config)
    if hidden != target_hidden and engine.embedding == "unread":
        yield Finding("refused", f"it takes the target's embedding (width {target_hidden}) always, the draft has its "
                      f"own of width {hidden}", "train a draft of the target's width")  # fmt: skip
    held = any(understood(engine, view, key) == "embed_tokens.weight" for key in view.shapes)
    if hidden == target_hidden and held and engine.embedding == "kept":
        yield Finding("note", "it keeps embed_tokens.weight where that differs from the target's; SGLang never does",
                      "remove it, unless the draft was trained with an embedding of its own")  # fmt: skip


def vocabulary(engine: Engine, view: View) -> Iterator[Finding]:
    _, _, vocab, draft_vocab = tensors.sizes(view.config)
    present = any(understood(engine, view, key) == "d2t" for key in view.shapes)
    if draft_vocab < vocab and not present:
        level = "refused" if engine.full_d2t == "required" else "wrong"
        yield Finding(level, f"no d2t with {draft_vocab} of {vocab} tokens: draft token i is taken for target token i",
                      "export again with the vocabulary map")  # fmt: skip
    if draft_vocab == vocab and present and engine.full_d2t == "refused":
        yield Finding("refused", "it stops at d2t where the draft has the whole vocabulary", "remove d2t and t2d")
    if draft_vocab == vocab and not present and engine.full_d2t == "required":
        yield Finding("refused", "it needs d2t, of zeros where the draft has the whole vocabulary",
                      "export with --engine for it")  # fmt: skip


def switches(engine: Engine, view: View) -> Iterator[Finding]:
    served = engine.kinds.get(view.kind.name)
    honoured = () if served is None else served.switches
    for name in SWITCHES:
        if not switch(view.config, name):
            continue
        if name not in honoured:
            yield Finding(
                "wrong",
                f"it ignores {name}",
                f"take an engine that has it (--engine, export.engine), or train without {name}",
            )
        elif not view.config.get(name) and view.config.get("use_aux_norm") and "fc_norm" not in engine.other_names:
            yield Finding("wrong", "it does not read use_aux_norm, SGLang's other name", 'write "fc_norm": true')


def config_fields(engine: Engine, view: View) -> Iterator[Finding]:
    for name in engine.required_fields:
        if name not in view.config:
            yield Finding("refused", f"config.json has no {name}", "write it, also where the vocabulary is whole")
    for name in engine.not_null:
        if name in view.config and view.config[name] is None:
            yield Finding(
                "refused", f"{name} is null, which is not the same as absent", f"write a number, or no {name}"
            )
    if engine.reads_tied_head and view.config.get("tie_word_embeddings", True):
        said = "true" if "tie_word_embeddings" in view.config else "absent"
        yield Finding("wrong", f"tie_word_embeddings is {said}: its head is then the embedding, not lm_head.weight",
                      'write "tie_word_embeddings": false')  # fmt: skip
    if view.config.get("attention_bias") and not engine.attention_bias:
        yield Finding("wrong", "it ignores attention_bias and the biases", "train without them")


def tapped_layers(engine: Engine, view: View) -> Iterator[Finding]:
    """What the engine would capture against what the draft was trained on."""
    target = view.target or {}
    deepseek, num_layers = layer_ids.is_deepseek(target), target.get("num_hidden_layers")
    if (
        engine.target_types is not None
        and view.target is not None
        and target.get("model_type") not in engine.target_types
    ):
        if "model_type" in target:
            yield Finding("refused", f"it taps no {target['model_type']} targets", "serve with another engine")
        else:
            taps_alone = " and ".join(engine.target_types)
            yield Finding("refused", f"it taps {taps_alone} targets alone, and the target's type is not known",
                          "give --target")  # fmt: skip
    trained = layer_ids.outputs_of(view.config, deepseek)
    if trained is None or len(trained) != tensors.NUM_TAPS:
        return
    if num_layers is not None and trained[-1] == num_layers - 1 and not engine.last_layer:
        yield Finding("refused", f"layer {trained[-1]} is the target's last, whose output it cannot capture",
                      f"train with layers up to {num_layers - 2} (target.tap_layers)")  # fmt: skip
    captured = _captured(engine, view, num_layers or trained[-1] + 4, deepseek)
    if captured != trained:
        where = " or ".join(engine.tap_fields) or "no field of the draft's"
        mend = "train with the default layers 1, n//2-1, n-4"
        if engine.tap_fields:
            mend = "write both places (tools/convert/to_serving.py does)"
        yield Finding("wrong", f"it takes layer ids from {where}, hence the outputs of {captured}; the draft was "
                      f"trained on {trained}", mend)  # fmt: skip


def _captured(engine: Engine, view: View, num_layers: int, deepseek: bool) -> list[int]:
    for field in engine.tap_fields:
        place, _, name = field.rpartition(".")
        source = view.config.get(place) if place else view.config
        ids = source.get(name) if isinstance(source, dict) else None
        if ids is None:
            continue
        if name == layer_ids.NAME and place:
            return layer_ids.sglang_outputs(ids, deepseek)
        return [layer - 1 for layer in ids]
    return layer_ids.default_outputs(num_layers)


def rope(engine: Engine, view: View) -> Iterator[Finding]:
    yield from sanity.rope_as_read(view, engine.rope_dialects, engine.rope_types)
    meant = rope_fields.parameters(view.config)
    if meant["rope_type"] == "yarn" and engine.serves and sanity.reads_rope(view, engine.rope_dialects):
        yield from sanity.yarn(meant)
        yield from view.kind.yarn(meant)


def widths(engine: Engine, view: View) -> Iterator[Finding]:
    hidden, target_hidden, _, _ = tensors.sizes(view.config)
    if engine.serves and tensors.NUM_TAPS * target_hidden == hidden:
        yield Finding("refused", f"hidden_size {hidden} equals 3 x the target's {target_hidden}: tapped states and "
                      "draft states are told apart by width, fc would be left out", "train another width")  # fmt: skip


CONFIG_RULES: tuple[Rule, ...] = (
    architecture, layers, embedding, switches, config_fields, tapped_layers, rope, widths,
)  # fmt: skip
TENSOR_RULES: tuple[Rule, ...] = (keys, vocabulary)


def of_config(engine: Engine, view: View) -> list[Finding]:
    """What those of every draft and those of its kind find."""
    return [finding for rule in (*CONFIG_RULES, *view.kind.rules) for finding in rule(engine, view)]


def of_tensors(engine: Engine, view: View) -> list[Finding]:
    return [finding for rule in TENSOR_RULES for finding in rule(engine, view)]
