"""config.json of other trainers, in the form that engines read, and what each trainer means by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from flaxdraft.algorithms.eagle3.serving import layer_ids
from flaxdraft.algorithms.eagle3.serving.kinds import kind_of
from flaxdraft.algorithms.eagle3.serving.terms import switch
from flaxdraft.errors import InputError
from flaxdraft.plugins import first_architecture
from flaxdraft.serving import rope_fields
from flaxdraft.serving.foreign.layers import FORM, layer_of

Trainer = Literal["flaxdraft", "specforge", "torchspec", "nemo", "eagle", "speculators"]
TRAINERS = ("specforge", "torchspec", "nemo", "eagle", "speculators")
_ARCHITECTURES: dict[str | None, Trainer] = {
    "LlamaEagle3DraftModel": "nemo", "DeepseekV3Eagle3DraftModel": "nemo",
    "DeepseekV3ForCausalLMEagle3": "specforge", "LlamaForCausalLM": "eagle",
}  # fmt: skip
_SERVED_AS = {"llama": "LlamaForCausalLMEagle3", "qwen3": "Eagle3Qwen3ForCausalLM"}
_SPECULATORS_TOP = (
    "draft_vocab_size", "target_hidden_size", "fc_norm", "norm_output", "norm_before_fc", "norm_before_residual",
    layer_ids.NAME,
)  # fmt: skip
_TRUE_POST_NORM = ("flaxdraft", "nemo", "speculators")  # norm_output carries the normed state there


class Understood(NamedTuple):
    """A config in the engines' form, and remarks for the report."""

    config: dict[str, Any]
    trainer: Trainer | None
    remarks: list[str]


def trainer_of(config: Mapping[str, Any], has_training_state: bool) -> Trainer | None:
    """Who wrote it, where that can be told."""
    if config.get("draft_trainer") == "flaxdraft":
        return "flaxdraft"
    if FORM in config:
        return "speculators"
    if has_training_state:
        return "specforge"
    return _ARCHITECTURES.get(first_architecture(config) or "")


def understand(
    config: Mapping[str, Any], trainer: Trainer | None, recurrence: Literal["pre-norm", "post-norm"] | None, origin: str
) -> Understood:
    """
    Args:
        recurrence: which state the next step reads, where the config leaves that open.

    Raises:
        InputError: a form or a switch that no draft of this project has, or one whose meaning nobody can tell.
    """
    remarks: list[str] = []
    if trainer == "speculators":
        out = of_speculators(config, "eagle3", (*_SERVED_AS,), origin)
        _check_residual(config, origin)
    else:
        out = dict(config)
    out = {name: value for name, value in out.items() if value is not None}
    _switches(out, trainer, recurrence, remarks, origin)
    if config.get("embed_requires_grad"):
        raise InputError(
            f"{origin}: embed_requires_grad is true: the embedding was trained, which engines replace with the "
            "target's; such a draft is not supported"
        )
    put_layers(out, remarks)
    _rope(out, trainer, remarks)
    return Understood(out, trainer, remarks)


def of_speculators(config: Mapping[str, Any], algorithm: str, kinds: tuple[str, ...], origin: str) -> dict[str, Any]:
    """The form of speculators, whose layer is an object of its own, with every field where engines read it.

    Args:
        algorithm: the one that is expected.
        kinds: the types of layers that its drafts may have.

    Raises:
        InputError: it is of another algorithm, or has another layer.
    """
    if config[FORM] != algorithm:
        raise InputError(f"{origin}: {FORM} {config[FORM]!r}, expected {algorithm!r}")
    layer = layer_of(config, kinds, "llama", origin)
    if layer.get("use_sliding_window") or "sliding_attention" in (layer.get("layer_types") or ()):
        raise InputError(
            f"{origin}: transformer_layer_config asks for attention over a window; expected full attention"
        )
    top = {name: config[name] for name in _SPECULATORS_TOP if name in config}
    own = {
        "architectures": [_SERVED_AS[layer["model_type"]]], "num_hidden_layers": layer.get("num_hidden_layers", 1),
    }  # fmt: skip
    return layer | top | own


def _check_residual(config: Mapping[str, Any], origin: str) -> None:
    if "norm_before_residual" not in config:
        raise InputError(
            f"{origin}: no norm_before_residual, which engines read as true and the trainer as false: it says whether "
            "the residual stream starts from the normed state; write what the draft was trained with"
        )


def _switches(out: dict[str, Any], trainer: Trainer | None, recurrence, remarks: list[str], origin: str) -> None:
    for name in ("norm_before_fc", "norm_before_residual"):
        said = switch(out, name)
        out.pop(name, None)
        if said:
            out[name] = True
    if trainer == "specforge" and out.get("norm_output") is False:
        raise InputError(f"{origin}: norm_output is false, which SpecForge reads as no norm before the head; engines "
                         "norm there always, so that this draft cannot be served")  # fmt: skip
    fc_norm, norm_output = switch(out, "fc_norm"), switch(out, "norm_output")
    for name in ("fc_norm", "use_aux_norm", "norm_output"):
        out.pop(name, None)
    if norm_output and recurrence is None:
        if trainer == "specforge":
            recurrence = "pre-norm"
            remarks.append("norm_output true left out: SpecForge means a norm before the head by it, the next step "
                           "of its training reads the state before the norm")  # fmt: skip
        elif trainer in _TRUE_POST_NORM:
            recurrence = "post-norm"
        else:
            raise InputError(f"{origin}: norm_output is true, and who trained the draft cannot be told. SpecForge "
                             "feeds back the state before the norm all the same, NeMo and speculators the normed one: "
                             "give --trainer, or --recurrence pre-norm or post-norm")  # fmt: skip
    if fc_norm:
        out["fc_norm"] = True
    if recurrence == "post-norm":
        out["norm_output"] = True


def put_layers(out: dict[str, Any], remarks: list[str]) -> None:
    """Both places for the tapped layers, where one of them names any."""
    outputs = layer_ids.outputs_of(out)
    if outputs is None:
        remarks.append("no tapped layers in config.json: the default ones, 1, n//2-1 and n-4")
        return
    deepseek = (
        kind_of(out).name == "mla" and outputs[0] != 1 and layer_ids.nested_ids(out) == [layer + 1 for layer in outputs]
    )
    out |= layer_ids.fields(outputs, deepseek)


def _rope(out: dict[str, Any], trainer: Trainer | None, remarks: list[str]) -> None:
    rope = rope_fields.parameters(out)
    theta, kind = rope["rope_theta"], rope["rope_type"]
    scaled = kind in ("linear", "dynamic", "yarn")
    fixed = trainer == "eagle" or (trainer in ("specforge", "torchspec") and kind_of(out).name == "mla" and scaled)
    if fixed and theta != rope_fields.DEFAULT_THETA:
        remarks.append(f"rope_theta is {theta:g}, but that trainer builds its rotary embedding with 10000 whatever "
                       "stands there; give --rope-theta 10000 unless yours was mended")  # fmt: skip
    if not rope_fields.spoken(out):
        remarks.append("no RoPE parameters in config.json: base 10000")
