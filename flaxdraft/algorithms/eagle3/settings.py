"""EAGLE-3's section of the configuration."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from flaxdraft.config import AlgorithmConfig, Number


class Settings(AlgorithmConfig):
    """`algorithm.name=eagle3`, the default."""

    # Sections are frozen by their `model_config`, which pyright does not read.
    name: Literal["eagle3"] = "eagle3"  # pyright: ignore[reportIncompatibleVariableOverride]
    ttt_length: int = Field(default=7, ge=1)  # steps of the unroll
    step_decay: Number = Field(default=0.8, gt=0, le=1)  # step j weighs step_decay^j in the loss
    objective: Literal["soft_cross_entropy", "hard_label", "lk_alpha", "lk_lambda"] = "soft_cross_entropy"
    attention: Literal["auto", "dense", "chunked", "cudnn"] = "auto"  # the last two: memory linear in length
    remat: Literal["none", "projections", "full"] = "none"  # what the backward pass computes anew
    loss_chunk: int = Field(default=512, ge=1)  # rows whose logits exist at a time
    attention_chunk: int = Field(default=256, ge=1)  # queries and keys whose scores exist at a time, when chunked

    free: ClassVar[tuple[str, ...]] = ("attention", "remat", "loss_chunk", "attention_chunk")
    default_architecture: ClassVar[str] = "llama"
    default_engine: ClassVar[str] = "sglang"  # its form serves others as well
