"""DFlash2's section of the configuration."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from flaxdraft.algorithms.dflash.settings import BlockSettings
from flaxdraft.config import Number, TrainConfig


class Settings(BlockSettings):
    """`algorithm.name=dflash2`. Of the parts, `draft.fields`: conv_kernel_size, conv_group_size, selector_rank,
    selector_top_k."""

    # Sections are frozen by their `model_config`, which pyright does not read.
    name: Literal["dflash2"] = "dflash2"  # pyright: ignore[reportIncompatibleVariableOverride]
    stop_at_hole: bool = False  # whether nothing of a block is trained behind a token that is not the assistant's
    # The selector's loss counts `selector_alpha` beside the one of the logits: after `selector_warmup_steps` without
    # it, it grows along a line for `selector_ramp_steps`. Where these are null they are shares of the run's steps.
    selector_alpha: Number = Field(default=1.0, ge=0)
    selector_warmup_ratio: Number = Field(default=0.0005, ge=0, le=1)
    selector_ramp_ratio: Number = Field(default=0.0005, ge=0, le=1)
    selector_warmup_steps: int | None = Field(default=None, ge=0)
    selector_ramp_steps: int | None = Field(default=None, ge=0)  # 0: at once
    # Of a right token that is none of a slot's candidates: it adds nothing to the selector's loss, or stands there in
    # place of the last candidate (as in speculators).
    selector_missing_label: Literal["left_out", "last_candidate"] = "left_out"
    selector_stop_gradient: bool = False  # whether the selector's loss trains the selector alone, not the layers

    in_draft: ClassVar[tuple[str, ...]] = ("block_size",)

    def for_run(self, train: TrainConfig) -> Settings:
        shares = {"selector_warmup_steps": self.selector_warmup_ratio, "selector_ramp_steps": self.selector_ramp_ratio}
        steps = {name: int(train.num_steps * share) for name, share in shares.items() if getattr(self, name) is None}
        return self.model_copy(update=steps)
