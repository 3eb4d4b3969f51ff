"""What is wrong with a draft's directory whatever reads it: one function a question."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flaxdraft.algorithms.eagle3.serving import fields, sanity
from flaxdraft.algorithms.eagle3.serving.kinds import View
from flaxdraft.algorithms.peagle.mask_fields import mask_tokens_of
from flaxdraft.algorithms.peagle.serving import tensors
from flaxdraft.serving import sanity as everywhere
from flaxdraft.serving.fields import SIZE, wrong
from flaxdraft.serving.finding import Finding, few


def malformed(config: Mapping[str, Any]) -> list[str]:
    """Fields without which nothing more can be asked, or which hold what no such field can."""
    bad = [*wrong(config, {"num_hidden_layers": SIZE}), *fields.sizeless(config), *fields.malformed(config)]
    found = mask_tokens_of(config)
    if not found:
        bad.append("no mask_token_id, the token that is read at masked places")
    return bad + [
        f"{place} is {value!r}, expected a token of the target"
        for place, value in found.items()
        if type(value) is not int or value < 0
    ]


def shapes(view: View) -> Iterator[Finding]:
    """Sizes in config.json against the weights."""
    expected = tensors.weights(view.config, view.kind) | tensors.tables(view.config)
    bad = []
    for key, found in view.shapes.items():
        name = tensors.flat_name(key)
        # Engines make one row of it, with however many axes of size 1 in front.
        flat = (1, 1, *found[-1:]) if name == tensors.MASK_STATE and set(found[:-1]) <= {1} else found
        if name in expected and flat != expected[name]:
            bad.append(f"{key} {found}, config.json says {expected[name]}")
    if bad:
        yield Finding("refused", f"config.json and weights differ in size: {few(bad)}", "correct config.json")
    if view.twice:
        yield Finding("wrong", f"two files hold {few([*view.twice])}", "remove one of them")


def mask_token(view: View) -> Iterator[Finding]:
    found, vocab_size = mask_tokens_of(view.config), view.config["vocab_size"]
    place, mask = next(iter(found.items()))
    if len(set(found.values())) > 1:
        said = ", ".join(f"{name} {value}" for name, value in found.items())
        yield Finding("wrong", f"{said}: different tokens for masked places, of which {place} is read",
                      "write the one of training, in one place")  # fmt: skip
    if mask >= vocab_size:
        yield Finding("refused", f"{place} is {mask}, beyond the vocabulary of {vocab_size}",
                      "write the token that the draft was trained with")  # fmt: skip
    ends = (view.target or {}).get("eos_token_id")
    if mask in (ends if isinstance(ends, list) else [ends]):
        yield Finding("note", f"{place} {mask} is a token that ends the target's answers", "check that the draft was "
                      "trained so")  # fmt: skip


def post_norm(view: View) -> Iterator[Finding]:
    if view.config.get("norm_output"):
        yield Finding("wrong", "norm_output is true: it says which state the next step reads, and there is none",
                      "remove it")  # fmt: skip


CONFIG_RULES: tuple[Callable[[View], Iterator[Finding]], ...] = (
    everywhere.nulls, everywhere.context, everywhere.rope, sanity.target, sanity.tapped_layers, mask_token, post_norm,
)  # fmt: skip
TENSOR_RULES: tuple[Callable[[View], Iterator[Finding]], ...] = (shapes, sanity.values, sanity.vocabulary)


def of_directory(view: View) -> list[Finding]:
    return [finding for rule in (*TENSOR_RULES, *CONFIG_RULES) for finding in rule(view)]


def of_sizes(view: View) -> list[Finding]:
    return [*shapes(view), *sanity.target(view)]
