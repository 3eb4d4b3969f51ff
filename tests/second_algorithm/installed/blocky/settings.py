"""The section of the configuration."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from flaxdraft.config import AlgorithmConfig, Number


class Settings(AlgorithmConfig):
    """`algorithm.name=blocky`."""

    name: Literal["blocky"] = "blocky"
    block_size: int = Field(default=8, ge=2)  # the newest token and all that is proposed at once
    num_anchors: int = Field(default=16, ge=1)  # blocks of a batch row in a step
    gamma: Number = Field(default=4.0, gt=0)  # proposal i weighs exp(-(i - 1) / gamma) in the loss,
    gamma_steps: int = Field(default=1, ge=1)  # once so many steps are done; before them gamma is smaller

    in_draft: ClassVar[tuple[str, ...]] = ("block_size",)
    default_architecture: ClassVar[str] = "plain"
    default_engine: ClassVar[str] = "hf"
