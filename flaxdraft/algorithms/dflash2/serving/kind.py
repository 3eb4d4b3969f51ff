"""What a DFlash2 draft's directory holds besides what a DFlash draft's does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field

from flaxdraft.algorithms.dflash.serving import tensors
from flaxdraft.algorithms.dflash.serving.kind import Kind, Section
from flaxdraft.algorithms.dflash.serving.tensors import Shapes, block_size, is_reduced
from flaxdraft.algorithms.dflash.serving.terms import CONFIG
from flaxdraft.algorithms.dflash2.names import CODEBOOKS
from flaxdraft.algorithms.dflash2.sizes import OWN_FIELDS, PROJECTOR
from flaxdraft.serving.finding import Finding
from flaxdraft.serving.view import DraftView

_Size = Annotated[int, Field(gt=0, lt=2**31)]


class DFlash2Section(Section):
    """dflash_config of config.json."""

    conv_kernel_size: _Size
    conv_group_size: _Size
    selector_rank: _Size
    selector_top_k: _Size


def flat_name(key: str) -> str:
    """The classes that trained a draft call the codebooks `.weight`; what they save does not."""
    name = tensors.flat_name(key)
    codebook = name.removesuffix(".weight")
    return codebook if codebook in CODEBOOKS else name


def own(config: Mapping[str, Any]) -> Shapes:
    nested, hidden, vocab_size = config[CONFIG], config["hidden_size"], config["vocab_size"]
    taps, rank = nested["conv_kernel_size"], nested["selector_rank"]
    convolution = {
        "base_kernel": (2, taps, hidden),
        "kernel_projection.weight": (2 * taps * (hidden // nested["conv_group_size"]), hidden),
    }  # fmt: skip
    return {
        "candidate_selector.predecessor_codebook": (vocab_size, rank),
        "candidate_selector.successor_codebook": (vocab_size, rank),
        "candidate_selector.hidden_projection.weight": (rank, hidden),
        **{f"layers.{i}.{part}_conv.{name}": shape for i in range(config["num_hidden_layers"])
           for part in ("attention", "mlp") for name, shape in convolution.items()},
    }  # fmt: skip


def sizes(view: DraftView) -> Iterator[Finding]:
    nested, hidden = view.config[CONFIG], view.config["hidden_size"]
    for name, most, what in (
        ("conv_kernel_size", block_size(view.config), "block_size"),
        ("selector_top_k", view.config["vocab_size"], "vocab_size"),
    ):
        if nested[name] > most:
            yield Finding("refused", f"{name} is {nested[name]}, {what} {most}", "write the one of training")
    if hidden % nested["conv_group_size"]:
        yield Finding("refused", f"conv_group_size {nested['conv_group_size']} does not divide hidden_size {hidden}",
                      "write the one of training")  # fmt: skip


def slots(view: DraftView) -> Iterator[Finding]:
    if view.config[CONFIG].get("sample_from_anchor"):
        yield Finding("wrong", "sample_from_anchor is true: such drafts predict the token at a slot's own place",
                      "leave it out")  # fmt: skip


def vocabulary(view: DraftView) -> Iterator[Finding]:
    if is_reduced(view.config):
        yield Finding("refused", f"draft_vocab_size is {view.config['draft_vocab_size']} of "
                      f"{view.config['vocab_size']}: candidates are tokens of the whole vocabulary",
                      "leave it out")  # fmt: skip


DFLASH2 = Kind(
    DFlash2Section, "mask_token_id, target_layer_ids, conv_kernel_size, conv_group_size, selector_rank and "
    "selector_top_k", PROJECTOR, OWN_FIELDS, own, (sizes, slots, vocabulary),
)  # fmt: skip
