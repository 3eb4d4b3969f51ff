"""What is wrong with a draft's directory whatever reads it: one function a question."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from flaxdraft.algorithms.eagle3.serving import layer_ids, tensors
from flaxdraft.algorithms.eagle3.serving.kinds import View
from flaxdraft.algorithms.eagle3.serving.target_embedding import embedding
from flaxdraft.algorithms.eagle3.serving.terms import switch
from flaxdraft.serving import sanity
from flaxdraft.serving.finding import Finding, few


def shapes(view: View) -> Iterator[Finding]:
    """Sizes in config.json against the weights."""
    expected = tensors.extras(view.config) | tensors.weights(view.config, view.kind)
    wrong = [
        f"{key} {view.shapes[key]}, config.json says {expected[name]}"
        for key in view.shapes
        if (name := tensors.flat_name(key)) in expected and view.shapes[key] != expected[name]
    ]
    if wrong:
        yield Finding("refused", f"config.json and weights differ in size: {few(wrong)}", "correct config.json")
    if view.twice:
        yield Finding("wrong", f"two files hold {few([*view.twice])}", "remove one of them")


def vocabulary(view: View) -> Iterator[Finding]:
    """d2t holds offsets to ascending target ids, and t2d is their mask."""
    names = {tensors.flat_name(key): key for key in view.shapes}
    _, _, vocab, draft_vocab = tensors.sizes(view.config)
    if "d2t" not in names or view.shapes[names["d2t"]] != (draft_vocab,):
        return
    d2t = view.read(names["d2t"]).astype(np.int64)
    ids = d2t + np.arange(draft_vocab)
    member = view.read(names["t2d"]).astype(bool) if "t2d" in names else None
    if member is not None and member.shape != (vocab,):
        member = None
    inside = bool((ids >= 0).all() and (ids < vocab).all())
    if not inside or len(np.unique(ids)) < draft_vocab:
        reason = "leave the target's vocabulary" if not inside else "name a target token twice"
        yield Finding("wrong", f"i + d2t[i] {reason}: d2t holds ids where offsets belong, or is of another model",
                      "convert with tools/convert/from_pytorch.py")  # fmt: skip
        return
    if member is not None and not np.array_equal(np.flatnonzero(member), np.sort(ids)):
        absolute = np.array_equal(np.flatnonzero(member), np.sort(d2t))
        reason = (
            "d2t holds target ids where offsets belong" if absolute else "d2t and t2d belong to different vocabularies"
        )
        yield Finding("wrong", f"t2d is not the mask of i + d2t[i]: {reason}",
                      "convert with tools/convert/from_pytorch.py")  # fmt: skip
    if draft_vocab < vocab and np.array_equal(ids, np.arange(draft_vocab)):
        yield Finding("wrong", f"d2t is the identity: the draft's tokens are the target's first {draft_vocab}, which "
                      "is what a lost vocabulary map looks like", "export it with its own map")  # fmt: skip
    if member is None and draft_vocab < vocab and (np.diff(d2t) > 0).all():
        yield Finding("note", "d2t ascends strictly and no t2d tells whether it holds offsets or ids", "add t2d")
    if (np.diff(ids) <= 0).any():
        yield Finding("note", "target ids do not ascend; engines do not mind, other trainers refuse such a map",
                      "convert with tools/convert/from_pytorch.py, which sorts them")  # fmt: skip


def values(view: View) -> Iterator[Finding]:
    return sanity.values(view, lambda key: tensors.flat_name(key) in ("d2t", "t2d") or tensors.BUFFERS.search(key))


def post_norm(view: View) -> Iterator[Finding]:
    if switch(view.config, "norm_output") and sanity.MARK not in view.config:
        yield Finding("wrong", "norm_output is true: engines feed the normed state back, while SpecForge trains on "
                      "the state before the norm whatever the field says (there it means a norm before the head)",
                      "remove norm_output if SpecForge trained the draft; else nothing is to do")  # fmt: skip


def target(view: View) -> Iterator[Finding]:
    if view.target is None:
        return
    _, hidden, vocab, _ = tensors.sizes(view.config)
    for name, ours, theirs in (
        ("target_hidden_size", hidden, view.target.get("hidden_size")),
        ("vocab_size", vocab, view.target.get("vocab_size")),
    ):
        if theirs is not None and ours != theirs:
            yield Finding("refused", f"{name} is {ours}, the target's {theirs}", "this draft is for another target")


def tapped_layers(view: View) -> Iterator[Finding]:
    """Both places, one meaning."""
    top, nested = view.config.get(layer_ids.NAME), layer_ids.nested_ids(view.config)
    for ids in (top, nested):
        if ids is not None and (sorted(set(ids)) != list(ids) or len(ids) != tensors.NUM_TAPS):
            yield Finding("wrong", f"layer ids {ids} are not {tensors.NUM_TAPS} ascending ones: engines hand the "
                          "states over in layer order",
                          "write ascending ids, and fc's columns in that order")  # fmt: skip
            return
    if (top is None) != (nested is None):
        there, missing = ("top level", "eagle_config") if nested is None else ("eagle_config", "top level")
        yield Finding("note", f"layer ids stand in the {there} and not in the {missing}", "write both places")
    if top is None or nested is None:
        return
    families = [layer_ids.is_deepseek(view.target)] if view.target is not None else [False, True]
    wanted = [layer - 1 for layer in top]
    if not any(layer_ids.sglang_outputs(nested, deepseek) == wanted for deepseek in families):
        yield Finding("wrong", f"the top level names the inputs of layers {top}, eagle_config {nested}: different "
                      "states", "write the layers that the draft was trained on in both")  # fmt: skip


CONFIG_RULES: tuple[Callable[[View], Iterator[Finding]], ...] = (
    sanity.nulls, post_norm, sanity.context, sanity.rope, target, tapped_layers,
)  # fmt: skip
TENSOR_RULES: tuple[Callable[[View], Iterator[Finding]], ...] = (shapes, values, vocabulary, embedding)


def of_directory(view: View) -> list[Finding]:
    return [finding for rule in (*TENSOR_RULES, *CONFIG_RULES) for finding in rule(view)]
