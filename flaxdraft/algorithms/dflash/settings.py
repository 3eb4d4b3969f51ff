"""DFlash's section of the configuration."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from flaxdraft.config import AlgorithmConfig, Number


class BlockSettings(AlgorithmConfig):
    """What every algorithm has that drafts in blocks. The defaults suit a small target; for Qwen3-8B: blocks of 16, 512
    anchors, decay 7."""

    block_size: int = Field(default=8, ge=2)  # the newest token and the mask tokens behind it
    num_anchors: int = Field(default=8, ge=1)  # blocks that a step draws from a batch row
    # Slots that predict weigh 1, exp(-1 / gamma), exp(-2 / gamma), ...; null: all 1
    decay_gamma: Number | None = Field(default=4.0, gt=0)
    attention: Literal["auto", "dense", "chunked"] = "auto"  # chunked: memory linear in length
    remat: Literal["none", "projections", "full"] = "none"  # what the backward pass computes anew
    loss_chunk: int = Field(default=512, ge=1)  # slots whose logits exist at a time
    attention_chunk: int = Field(default=256, ge=1)  # queries and keys whose scores exist at a time, when chunked

    free: ClassVar[tuple[str, ...]] = ("attention", "remat", "loss_chunk", "attention_chunk")
    default_architecture: ClassVar[str] = "qwen3"
    default_engine: ClassVar[str] = "sglang"


class Settings(BlockSettings):
    """`algorithm.name=dflash`."""

    # Sections are frozen by their `model_config`, which pyright does not read.
    name: Literal["dflash"] = "dflash"  # pyright: ignore[reportIncompatibleVariableOverride]
    block_size: int = Field(default=4, ge=2)  # as many proposals as a chain has
    stop_at_hole: bool = False  # whether nothing of a block is trained behind a token that is not the assistant's
    sample_from_anchor: bool = False  # slot k predicts the token behind its own place, the newest token's slot too
    # d-pace weighs by the draft's own confidence along the block (arXiv 2605.18810), the other two by a factor of it;
    # none of these reads `decay_gamma`.
    objective: Literal["decay", "dpace", "dpace_confidence", "dpace_continuation"] = "decay"
    dpace_alpha: Number = Field(default=0.5, ge=0, le=1)  # of d-pace: the confidence that a slot has at least
    denominator: Literal["weights", "rows"] = "weights"  # what the loss is divided by; d-pace's authors: batch rows

    in_draft: ClassVar[tuple[str, ...]] = ("block_size", "sample_from_anchor")
