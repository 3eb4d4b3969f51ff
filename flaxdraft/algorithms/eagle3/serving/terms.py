"""The terms in which engines and draft architectures say what serving has to know of them.

A table in engines/ is an `Engine` and nothing else; each file of drafts/ declares a `Kind`, its attention as engines
know it. A new kind brings all of this itself; engines that are not in its file and whose tables do not name it serve no
such drafts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from flaxdraft.serving import contract
from flaxdraft.serving.fields import Expected
from flaxdraft.serving.finding import Finding
from flaxdraft.serving.view import DraftView

SWITCHES = ("fc_norm", "norm_output", "norm_before_fc", "norm_before_residual")  # of config.json, false where absent

Shapes = dict[str, tuple[int, ...]]
Config = Mapping[str, Any]  # config.json


class Served(NamedTuple):
    """How an engine serves drafts of one kind."""

    architectures: tuple[str, ...]  # names in `architectures` that it takes for such a draft, the one to write first
    switches: tuple[str, ...] = ()  # of SWITCHES, those it honours
    model_prefix: bool = False  # `model.` before a key is taken off


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine(contract.Engine):
    """What one engine reads from config.json and the weights, and what it does about the rest."""

    kinds: Mapping[str, Served]  # by their names; a kind that it cannot serve is absent

    layer_prefixes: tuple[str, ...] = ("midlayer.", "layers.0.")
    unknown_key: Literal["skipped", "refused", "unread"]  # "unread": it looks for its own names alone
    missing_key: Literal["random", "fails"]  # "random": it serves with whatever the memory was initialised to
    # "replaced": the target's takes its place where the widths agree; "kept": where it differs from the target's;
    # "unread": the target's is used always.
    embedding: Literal["replaced", "kept", "unread"]
    shares_head: bool = False  # without lm_head.weight it takes the target's
    full_d2t: Literal["read", "refused", "required"] = "read"  # d2t where the draft has the target's whole vocabulary

    other_names: Mapping[str, str] = dataclasses.field(default_factory=dict)  # field -> another one it reads for it
    required_fields: tuple[str, ...] = ()  # without these it stops
    not_null: tuple[str, ...] = ()  # null is not the same as absent
    reads_tied_head: bool = True  # tie_word_embeddings: true makes the embedding the head, and it is true if absent
    attention_bias: bool = False  # loads biases of q, k and v

    # Where it finds the tapped layers, first match; none: it always takes its own.
    tap_fields: tuple[str, ...] = ()
    last_layer: bool = False  # can hand over the output of the target's last layer
    target_types: tuple[str, ...] | None = None  # model types that it can tap; None: all of this project's

    rope_dialects: tuple[str, ...]  # of "rope_parameters" and "rope_theta", those it reads
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    max_layers: int | None = 1  # None: any number


Rule = Callable[[Engine, DraftView], Iterator[Finding]]


def _nothing(rope: Mapping[str, Any]) -> Iterator[Finding]:
    yield from ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """An attention as engines know it."""

    name: str  # in messages and in the engines' tables
    title: str  # on the model card
    architecture: str  # what an imported draft's config.json is given as `architectures`,
    model_type: str  # and as `model_type`
    # Whether a config.json is of this kind. None: it has no fields of its own, and what no other kind claims is of it;
    # one kind alone can be so.
    claims: Callable[[Config], bool] | None = None
    sizes: tuple[str, ...] = ()  # fields that must hold positive integers, beside those of every draft
    fields: Mapping[str, Expected] = dataclasses.field(default_factory=dict)  # what others of its own hold, if there
    attention: Callable[[Config], Shapes]  # its weights' names behind `self_attn.`, and PyTorch shapes [out, in]
    rules: tuple[Rule, ...] = ()  # beyond those of every draft
    yarn: Callable[[Mapping[str, Any]], Iterator[Finding]] = _nothing  # what engines make of YaRN's parameters
    engines: Mapping[str, Served] = dataclasses.field(default_factory=dict)  # that serve it, beside those that name it


def switch(config: Config, name: str) -> bool:
    """A switch of config.json, at the top, in eagle_config, or under SGLang's other name of fc_norm."""
    nested = config.get("eagle_config")
    places = [config, nested if isinstance(nested, dict) else {}]
    names = (name, "use_aux_norm") if name == "fc_norm" else (name,)
    return any(bool(place.get(one)) for place in places for one in names)
