"""config.json of other trainers, in the form that engines read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxdraft.algorithms.eagle3.foreign.configs import Trainer, of_speculators, put_layers
from flaxdraft.algorithms.eagle3.serving.terms import switch
from flaxdraft.algorithms.importing import algorithm_named
from flaxdraft.algorithms.peagle.drafts.llama import SERVING_ARCHITECTURE
from flaxdraft.algorithms.peagle.mask_fields import mask_tokens_of
from flaxdraft.algorithms.peagle.sizes import MARK
from flaxdraft.errors import InputError
from flaxdraft.plugins import first_architecture
from flaxdraft.serving import rope_fields
from flaxdraft.serving.foreign.layers import FORM

NAME = "peagle"
_TRAINERS: dict[str | None, Trainer] = {"PEagleDraftModel": "specforge", "LlamaForCausalLMPeagle": "nemo"}
_SWITCHES = ("fc_norm", "norm_before_fc", "norm_before_residual")


def claims(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of such a draft, whoever wrote it."""
    return config[FORM] == NAME if FORM in config else algorithm_named(config) == NAME


def trainer_of(config: Mapping[str, Any], has_training_state: bool) -> Trainer | None:
    """Who wrote it, where that can be told."""
    if FORM in config:
        return "speculators"
    return "specforge" if has_training_state else _TRAINERS.get(first_architecture(config))


def understand(config: Mapping[str, Any], origin: str) -> tuple[dict[str, Any], list[str]]:
    """A config in the engines' form, and remarks for the report.

    Raises:
        InputError: a form or a field that no draft of this project has, or no mask token, or several.
    """
    remarks: list[str] = []
    out = of_speculators(config, NAME, ("llama",), origin) if FORM in config else dict(config)
    out = {name: value for name, value in out.items() if value is not None}
    if config.get("embed_requires_grad") is False:
        remarks.append("embed_requires_grad is false: the embedding is still that of the target; it is the draft's own")
    for name in _SWITCHES:
        said = switch(out, name)
        out.pop(name, None)
        if said:
            out[name] = True
    for name in ("use_aux_norm", "embed_requires_grad"):
        out.pop(name, None)
    if out.pop("norm_output", False):
        remarks.append("norm_output true left out: it says which state a next step reads, and there is none")
    put_layers(out, remarks)
    if not rope_fields.spoken(out):
        remarks.append("no RoPE parameters in config.json: base 10000")
    own = {
        "architectures": [SERVING_ARCHITECTURE], "model_type": "llama", "tie_word_embeddings": False, MARK: True,
        "mask_token_id": _mask_token(config, origin),
    }  # fmt: skip
    return out | own, remarks


def _mask_token(config: Mapping[str, Any], origin: str) -> int:
    found = mask_tokens_of(config)
    if not found:
        raise InputError(f"{origin}: no mask_token_id; write the token that the draft was trained with")
    first, *others = found.values()
    if any(value != first for value in others):
        said = ", ".join(f"{name} {value}" for name, value in found.items())
        raise InputError(f"{origin}: {said}: different tokens for masked places; write the one of training alone")
    return first
