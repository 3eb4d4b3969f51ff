"""DSpark's section of the configuration."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from flaxdraft.algorithms.dflash.settings import BlockSettings
from flaxdraft.config import Number


class Settings(BlockSettings):
    """`algorithm.name=dspark`. Of the head, `draft.fields`: markov_rank, markov_head_type (vanilla, gated, rnn),
    enable_confidence_head, confidence_head_with_markov. Nothing of a block is trained behind a token that is not the
    assistant's."""

    # Sections are frozen by their `model_config`, which pyright does not read.
    name: Literal["dspark"] = "dspark"  # pyright: ignore[reportIncompatibleVariableOverride]
    block_size: int = Field(default=7, ge=2)  # every slot proposes, the newest token's too
    # Shares of the loss: cross entropy with the text's tokens, distance of the draft's distribution from the target's,
    # and cross entropy of the confidence with the probability that the target accepts.
    ce_alpha: Number = Field(default=0.1, ge=0)
    l1_alpha: Number = Field(default=0.9, ge=0)
    confidence_alpha: Number = Field(default=1.0, ge=0)
    # Decoding: a block is proposed up to the first slot in which the confidence is less; 0: all of it.
    confidence_threshold: Number = Field(default=0.0, ge=0, lt=1)

    in_draft: ClassVar[tuple[str, ...]] = ("block_size",)
