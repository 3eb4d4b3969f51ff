"""What a DFlash2 draft has besides a DFlash draft's sizes; names as in config.json."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from flaxdraft.algorithms.dflash.sizes import BlockSizes, narrow_width
from flaxdraft.errors import InputError

ARCHITECTURE = "DFlash2DraftModel"  # SGLang, vLLM and other trainers, whatever the attention
PROJECTOR = "dflash2"
NESTED = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
# Those by which no draft of another algorithm is described.
OWN_FIELDS = ("conv_kernel_size", "selector_rank", "selector_top_k")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DFlash2Sizes(BlockSizes):
    """A draft architecture adds those of its attention.

    conv_kernel_size: the slots that a convolution reads, its own the first of them.
    conv_group_size: so many channels share what the state adds to their kernels.
    selector_rank: width of the codebooks.
    selector_top_k: a slot's candidates.
    """

    conv_kernel_size: int = 2
    conv_group_size: int
    selector_rank: int
    selector_top_k: int = 16

    projector: ClassVar[str] = PROJECTOR
    own_fields: ClassVar[tuple[str, ...]] = OWN_FIELDS
    whole_vocabulary: ClassVar[str | None] = "candidates are tokens of the whole vocabulary"

    def __post_init__(self):
        super().__post_init__()
        if self.sample_from_anchor:
            raise InputError(
                "draft.fields.sample_from_anchor: found True; dflash2's slots predict the token at their own place"
            )
        for name, most, what in (
            ("conv_kernel_size", self.block_size, "block_size"), ("selector_top_k", self.vocab_size, "vocab_size"),
        ):  # fmt: skip
            if (found := getattr(self, name)) > most:
                raise InputError(f"draft.fields.{name}: found {found}, expected at most {what}, {most}")
        if self.hidden_size % self.conv_group_size:
            raise InputError(
                f"draft.fields.conv_group_size: found {self.conv_group_size}, expected a divisor of hidden_size, "
                f"{self.hidden_size}"
            )

    @classmethod
    def sizes_for_target(cls, target: Any, draft_vocab_size: int) -> dict[str, Any]:
        own = {
            "conv_kernel_size": 2, "conv_group_size": math.gcd(target.hidden_size, 16),
            "selector_rank": narrow_width(target.hidden_size),
            "selector_top_k": min(16, target.vocab_size),
        }  # fmt: skip
        return super().sizes_for_target(target, draft_vocab_size) | own

    @classmethod
    def from_hf_sizes(cls, config: dict[str, Any]) -> dict[str, Any]:
        sizes = super().from_hf_sizes(config)
        return sizes | {name: config["dflash_config"][name] for name in NESTED}

    def to_hf_sizes(self, model_type: str) -> dict[str, Any]:
        out = super().to_hf_sizes(model_type)
        own = {"block_size": self.block_size, **{name: getattr(self, name) for name in NESTED}}
        return out | {"architectures": [ARCHITECTURE], "dflash_config": out["dflash_config"] | own}
