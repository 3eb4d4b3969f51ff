"""What a Domino draft's directory holds besides what a DFlash draft's does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field

from flaxdraft.algorithms.dflash.serving.kind import Kind, Section
from flaxdraft.algorithms.dflash.serving.tensors import Shapes, block_size
from flaxdraft.algorithms.dflash.serving.terms import CONFIG
from flaxdraft.algorithms.domino.sizes import PROJECTOR
from flaxdraft.serving.fields import SIZE
from flaxdraft.serving.finding import Finding
from flaxdraft.serving.view import DraftView

_Width = Annotated[int, Field(gt=0)]


class DominoSection(Section):
    """dflash_config of config.json."""

    gru_hidden_dim: _Width
    pure_draft_prefix_len: Annotated[int, Field(ge=0)]
    shift_label: bool
    emb_dim: _Width | None = None  # here or at the top level


def head(config: Mapping[str, Any]) -> Shapes:
    nested, hidden, vocab_size = config[CONFIG], config["hidden_size"], config["vocab_size"]
    state, width = nested["gru_hidden_dim"], nested.get("emb_dim") or config["emb_dim"]
    return {
        "prefix_gru.weight_ih_l0": (3 * state, hidden), "prefix_gru.weight_hh_l0": (3 * state, state),
        "embed_proj.0.weight": (width, hidden + state), "embed_proj.2.weight": (vocab_size, width),
    }  # fmt: skip


def widths(view: DraftView) -> Iterator[Finding]:
    top, nested = view.config.get("emb_dim"), view.config[CONFIG].get("emb_dim")
    if top is not None and nested is not None and top != nested:
        yield Finding("refused", f"emb_dim is {top}, in {CONFIG} {nested}", "write the one of the weights in both")


def slots(view: DraftView) -> Iterator[Finding]:
    """What a slot predicts is said once, or twice alike."""
    shifted = view.config[CONFIG]["shift_label"]
    for place, fields in (("", view.config), (f"{CONFIG}.", view.config[CONFIG])):
        said = fields.get("sample_from_anchor")
        if said is not None and said != shifted:
            what = f"{place}sample_from_anchor is {said}, shift_label {shifted}: what a slot predicts is shifted by one"
            yield Finding("wrong", what, "write shift_label alone, as in training")
    size, prefix = block_size(view.config), view.config[CONFIG]["pure_draft_prefix_len"]
    if prefix >= size:
        yield Finding("wrong", f"pure_draft_prefix_len is {prefix}, which leaves none of {size} slots to the head",
                      "write the one of training")  # fmt: skip


DOMINO = Kind(
    DominoSection, "mask_token_id, target_layer_ids, gru_hidden_dim, pure_draft_prefix_len and shift_label (true or "
    "false)", PROJECTOR, ("shift_label",), head, (widths, slots),
    top={"emb_dim": SIZE}, either=("emb_dim",),
)  # fmt: skip
