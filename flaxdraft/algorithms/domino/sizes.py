"""What a Domino draft has besides a DFlash draft's sizes; names as in config.json."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from flaxdraft.algorithms.dflash.sizes import BlockSizes, narrow_width
from flaxdraft.errors import InputError

# SpecForge writes the second one, which no engine registers.
ARCHITECTURES = ("DFlashDraftModel", "DominoDraftModel")
PROJECTOR = "domino"
NESTED = ("emb_dim", "gru_hidden_dim", "pure_draft_prefix_len", "shift_label")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DominoSizes(BlockSizes):
    """A draft architecture adds those of its attention.

    emb_dim: width of what the correction's matrix over the vocabulary reads.
    gru_hidden_dim: width of the state that goes along a block.
    """

    emb_dim: int
    gru_hidden_dim: int
    pure_draft_prefix_len: int = 1
    shift_label: bool = True

    projector: ClassVar[str] = PROJECTOR
    own_fields: ClassVar[tuple[str, ...]] = ("shift_label",)
    whole_vocabulary: ClassVar[str | None] = "the head corrects the logit of every token"
    may_be_zero: ClassVar[tuple[str, ...]] = (*BlockSizes.may_be_zero, "pure_draft_prefix_len")

    def __post_init__(self):
        super().__post_init__()
        if self.sample_from_anchor:
            raise InputError(
                "draft.fields.sample_from_anchor: found True; of domino algorithm.shift_label says what a slot predicts"
            )
        if type(self.pure_draft_prefix_len) is not int or not 0 <= self.pure_draft_prefix_len < self.block_size:
            raise InputError(
                f"draft.fields.pure_draft_prefix_len: found {self.pure_draft_prefix_len!r}, expected at least 0 and "
                f"less than block_size, {self.block_size}: of more nothing would be corrected"
            )

    @classmethod
    def sizes_for_target(cls, target: Any, draft_vocab_size: int) -> dict[str, Any]:
        """The state is a quarter as wide as the target, as in drafts of Qwen3-8B (1024 to 4096)."""
        widths = {
            "emb_dim": narrow_width(target.hidden_size),
            "gru_hidden_dim": max(target.hidden_size // 4 // 64 * 64, 64),
        }  # fmt: skip
        return super().sizes_for_target(target, draft_vocab_size) | widths

    @classmethod
    def from_hf_sizes(cls, config: dict[str, Any]) -> dict[str, Any]:
        """
        Raises:
            InputError: also where emb_dim stands in two places that differ, or shift_label is not said.
        """
        sizes, nested = super().from_hf_sizes(config), config["dflash_config"]
        widths = {place.get("emb_dim") for place in (config, nested)} - {None}
        if len(widths) > 1:
            raise InputError(
                f"draft config: emb_dim is {config['emb_dim']}, in dflash_config {nested['emb_dim']}; write the one of "
                "the weights in both"
            )
        if not isinstance(nested.get("shift_label"), bool):
            raise InputError(
                f"draft config: dflash_config.shift_label is {nested.get('shift_label')!r}, expected true or false: it "
                "says which token a slot predicts"
            )
        own = {name: nested[name] for name in NESTED if name != "emb_dim"}
        return sizes | own | {"emb_dim": nested["emb_dim"] if "emb_dim" in nested else config["emb_dim"]}

    def to_hf_sizes(self, model_type: str) -> dict[str, Any]:
        out = super().to_hf_sizes(model_type)
        own = {"projector_type": PROJECTOR, **{name: getattr(self, name) for name in NESTED}}
        return out | {"dflash_config": out["dflash_config"] | own}
