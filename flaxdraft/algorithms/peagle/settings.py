"""P-EAGLE's section of the configuration."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from flaxdraft.config import AlgorithmConfig, Number


class Settings(AlgorithmConfig):
    """`algorithm.name=peagle`. Depth 0 reads a real state and predicts the next token; each depth behind it reads a
    mask and predicts one token further."""

    # Sections are frozen by their `model_config`, which pyright does not read.
    name: Literal["peagle"] = "peagle"  # pyright: ignore[reportIncompatibleVariableOverride]
    num_depths: int = Field(default=5, ge=1)  # that are trained; more can be proposed, but nothing was learned of them
    # Depth d is trained at a share down_sample_ratio^d of the places, and never at less than down_sample_ratio_min.
    down_sample_ratio: Number = Field(default=0.8, gt=0, le=1)
    down_sample_ratio_min: Number = Field(default=0.2, ge=0, le=1)
    objective: Literal["soft_cross_entropy", "hard_label", "lk_alpha"] = "soft_cross_entropy"
    attention: Literal["auto", "dense", "chunked", "cudnn"] = "auto"  # the last two: memory linear in length
    remat: Literal["none", "projections", "full"] = "none"  # what the backward pass computes anew
    loss_chunk: int = Field(default=512, ge=1)  # places whose logits exist at a time
    attention_chunk: int = Field(default=256, ge=1)  # queries and keys whose scores exist at a time, when chunked

    free: ClassVar[tuple[str, ...]] = ("attention", "remat", "loss_chunk", "attention_chunk")
    default_architecture: ClassVar[str] = "llama"
    default_engine: ClassVar[str] = "vllm"  # alone serves such drafts
