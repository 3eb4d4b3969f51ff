"""Domino's section of the configuration."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field

from flaxdraft.algorithms.dflash.settings import BlockSettings
from flaxdraft.config import Number, TrainConfig


class Settings(BlockSettings):
    """`algorithm.name=domino`. The widths of the head are `draft.fields`, emb_dim and gru_hidden_dim."""

    # Sections are frozen by their `model_config`, which pyright does not read.
    name: Literal["domino"] = "domino"  # pyright: ignore[reportIncompatibleVariableOverride]
    stop_at_hole: bool = False  # whether nothing of a block is trained behind a token that is not the assistant's
    shift_label: bool = True  # slot k predicts the token behind its own place, the newest token's slot too
    pure_draft_prefix_len: int = Field(default=1, ge=0)  # proposals that are not corrected; SGLang serves 1 alone
    # The loss of the uncorrected logits has a share that falls from `base_start` to 0 in `base_steps` steps.
    base_start: Number = Field(default=1.0, ge=0)  # above 1 it stays 1 for a while
    base_ratio: Number = Field(default=1.0, ge=0, le=1)  # of the run's steps, where base_steps is null
    base_steps: int | None = Field(default=None, ge=1)

    in_draft: ClassVar[tuple[str, ...]] = ("block_size", "shift_label", "pure_draft_prefix_len")

    def for_run(self, train: TrainConfig) -> Settings:
        if self.base_steps is not None:
            return self
        steps = max(1, math.floor(train.num_steps * self.base_ratio))
        return self.model_copy(update={"base_steps": steps})
