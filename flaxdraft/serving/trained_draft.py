"""A trained draft and what an export asks of its surroundings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from flax import nnx

from flaxdraft.interfaces import Algorithm, VocabMap


class TrainedDraft(NamedTuple):
    """A draft's weights with all that gives them a meaning."""

    algorithm: Algorithm
    module: ModuleType  # its architecture
    config: Any  # of that module, see `interfaces.DraftConfig`
    params: nnx.State
    vocab: VocabMap


class AboutTarget(NamedTuple):
    """What is known of a draft's target, of which no weight is loaded."""

    config: Mapping[str, Any]  # its config.json, as far as known
    tap_layers: Sequence[int]  # by output


class Origin(NamedTuple):
    """Where a draft is from."""

    target: str  # the target's address
    run: Path | None  # the folder of its run; what that recorded of data, training and evaluation is shown
    step: int | None  # of the run's checkpoint; figures of another one are left out
    template: Mapping[str, Any] | None = None  # arguments of the chat template, where no run says them
