"""What a DSpark draft's directory holds besides what a DFlash draft's does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field

from flaxdraft.algorithms.dflash.serving.kind import Kind, Section
from flaxdraft.algorithms.dflash.serving.tensors import Shapes
from flaxdraft.algorithms.dflash.serving.terms import CONFIG
from flaxdraft.algorithms.dspark.sizes import HEAD, PROJECTOR, HeadType
from flaxdraft.serving.fields import FLAG, SIZE, Expected
from flaxdraft.serving.finding import Finding
from flaxdraft.serving.view import DraftView


class DSparkSection(Section):
    """dflash_config of config.json."""

    markov_rank: Annotated[int, Field(gt=0)] | None = None  # here or at the top level, as the next ones
    markov_head_type: HeadType | None = None
    enable_confidence_head: bool | None = None
    confidence_head_with_markov: bool | None = None


def of_head(config: Mapping[str, Any]) -> dict[str, Any]:
    """The heads' fields, wherever they stand."""
    return {name: place[name] for place in (config[CONFIG], config) for name in HEAD if place.get(name) is not None}


def head(config: Mapping[str, Any]) -> Shapes:
    told, hidden, vocab_size = of_head(config), config["hidden_size"], config["vocab_size"]
    rank = told["markov_rank"]
    num_known = config.get("draft_vocab_size") or vocab_size
    shapes: Shapes = {
        "markov_head.markov_w1.weight": (vocab_size, rank), "markov_head.markov_w2.weight": (num_known, rank),
    }  # fmt: skip
    linears = {"gated": ("gate_proj", rank, hidden + rank), "rnn": ("joint_proj", 3 * rank, 2 * rank + hidden)}
    if (kind := told.get("markov_head_type", "vanilla")) in linears:
        name, rows, columns = linears[kind]
        shapes |= {f"markov_head.{name}.weight": (rows, columns), f"markov_head.{name}.bias": (rows,)}
    if told.get("enable_confidence_head"):
        width = hidden + (rank if told.get("confidence_head_with_markov") else 0)
        shapes |= {"confidence_head.proj.weight": (1, width), "confidence_head.proj.bias": (1,)}
    return shapes


def fields(view: DraftView) -> Iterator[Finding]:
    nested = view.config[CONFIG]
    for name in HEAD:
        if name in view.config and name in nested and view.config[name] != nested[name]:
            what = f"{name} is {view.config[name]}, in {CONFIG} {nested[name]}: engines differ in which they read"
            yield Finding("wrong", what, "write the one of training in both")


def slots(view: DraftView) -> Iterator[Finding]:
    """The newest token's slot predicts as well."""
    for place, told in (("", view.config), (f"{CONFIG}.", view.config[CONFIG])):
        if told.get("sample_from_anchor") is False:
            yield Finding("wrong", f"{place}sample_from_anchor is false: slots are read as DFlash has them, each for "
                          "the token at its own place, one before the one that DSpark trains it for",
                          "write true")  # fmt: skip


_TOP = {
    "markov_rank": SIZE, "markov_head_type": Expected("vanilla, gated or rnn", HeadType),
    "enable_confidence_head": FLAG, "confidence_head_with_markov": FLAG,
}  # fmt: skip
DSPARK = Kind(
    DSparkSection, "mask_token_id and target_layer_ids (and the heads' fields, of which markov_head_type is vanilla, "
    "gated or rnn)", PROJECTOR, ("markov_rank",), head, (fields, slots), top=_TOP, either=("markov_rank",),
    from_anchor=True,
)  # fmt: skip
