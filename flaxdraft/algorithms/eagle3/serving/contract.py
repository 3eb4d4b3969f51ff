"""The terms of an engine's contract. A table in engines/ is data in these terms and nothing else.

A *kind* is a draft's attention: "llama" (grouped queries) or "mla" (latent).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from flaxdraft.errors import InputError
from flaxdraft.plugins import parts_of

Kind = Literal["llama", "mla"]
SWITCHES = ("fc_norm", "norm_output", "norm_before_fc", "norm_before_residual")  # of config.json, false where absent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """What one engine reads from config.json and the weights, and what it does about the rest."""

    title: str  # with the version whose source was read
    # Names in `architectures` that it serves as a draft of each kind, the one to write first; a kind it cannot serve is
    # absent.
    architectures: Mapping[Kind, tuple[str, ...]]

    # The command that serves a draft, its `{draft}` a directory, `{chain}` the draft tokens of a target pass and
    # `{verified}` one more; TARGET stands for the target's directory. None: nothing computes from it, so what matters
    # in service alone is not asked.
    serve: str | None
    layer_prefixes: tuple[str, ...] = ("midlayer.", "layers.0.")
    model_prefix: tuple[Kind, ...] = ()  # kinds for which `model.` before a key is taken off
    unknown_key: Literal["skipped", "refused", "unread"]  # "unread": it looks for its own names alone
    missing_key: Literal["random", "fails"]  # "random": it serves with whatever the memory was initialised to
    # "replaced": the target's takes its place where the widths agree; "kept": where it differs from the target's;
    # "unread": the target's is used always.
    embedding: Literal["replaced", "kept", "unread"]
    shares_head: bool = False  # without lm_head.weight it takes the target's
    full_d2t: Literal["read", "refused", "required"] = "read"  # d2t where the draft has the target's whole vocabulary

    switches: Mapping[Kind, tuple[str, ...]]  # of SWITCHES, those it honours
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

    @property
    def serves(self) -> bool:
        return self.serve is not None

    def command(self, draft: Path | str, chain_length: int) -> str:
        """What to type to serve a draft; of an engine that serves. Lines behind the first begin with four spaces."""
        assert self.serve is not None, self.title
        return self.serve.format(draft=draft, chain=chain_length, verified=chain_length + 1)


def engines() -> dict[str, Engine]:
    """Every table, by the name that a command line takes."""
    return {
        name.replace("_", "-"): module.ENGINE
        for name, module in sorted(parts_of("flaxdraft.algorithms.eagle3.serving.engines"))
    }


def find_engine(name: str, field: str = "engine") -> Engine:
    """
    Args:
        field: where the name was given, for the message.

    Raises:
        InputError: no such engine.
    """
    known = engines()
    if name not in known:
        raise InputError(f"{field}: no {name!r}; known are {', '.join(known)}. A new one is a new file in "
                         "flaxdraft/serving/engines/")  # fmt: skip
    return known[name]


def kind_of(config: Mapping[str, Any]) -> Kind:
    """A draft with a latent for its keys is an MLA draft."""
    return "mla" if config.get("kv_lora_rank") else "llama"


def switch(config: Mapping[str, Any], name: str) -> bool:
    """A switch of config.json, at the top, in eagle_config, or under SGLang's other name of fc_norm."""
    nested = config.get("eagle_config")
    places = [config, nested if isinstance(nested, dict) else {}]
    names = (name, "use_aux_norm") if name == "fc_norm" else (name,)
    return any(bool(place.get(one)) for place in places for one in names)
