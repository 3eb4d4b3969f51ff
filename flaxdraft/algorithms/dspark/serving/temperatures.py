"""The file in which SGLang reads the confidence's temperatures, one a slot of the block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxdraft.algorithms.dflash.serving.tensors import block_size

NAME = "confidence_temperatures.json"


def temperatures(config: Mapping[str, Any], evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    """What it holds: as a run's evaluation fitted them on its held-out answers, and 1 for slots behind the chain that
    was evaluated. None: the draft has no confidence head, or nothing was evaluated."""
    found = evaluation.get("teacher_forced", {}).get("confidence_temperatures")
    if found is None:
        return None
    padded = [*found, *[1.0] * block_size(config)][: block_size(config)]
    return {"temperatures": padded, "dataset": "the run's held-out answers", "num_samples": evaluation["answers"]}
