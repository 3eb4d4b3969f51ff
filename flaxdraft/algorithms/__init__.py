"""Training algorithms, one a folder. A new one is a new folder; nothing else is edited.

What such a folder holds stands in `interfaces.Algorithm`. The configuration's `algorithm.name` finds it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flaxdraft.plugins import find_by_name, parts_of, settings_of

if TYPE_CHECKING:
    from types import ModuleType

    from flaxdraft.config import AlgorithmConfig
    from flaxdraft.interfaces import Algorithm

DEFAULT = "eagle3"
PACKAGE = "flaxdraft.algorithms"
SHARED = ("importing", "loading")  # modules of this package that are no algorithm


def architecture(settings: AlgorithmConfig, name: str) -> ModuleType:
    """One of an algorithm's draft architectures.

    Raises:
        InputError: it has none of that name.
    """
    folder = find_by_name(PACKAGE, settings.name, "algorithm.name").__name__
    return find_by_name(f"{folder}.drafts", name, "draft.architecture")


def make(settings: AlgorithmConfig, *, packed: bool) -> Algorithm:
    """The algorithm of a configuration.

    Args:
        packed: whether a row may hold several documents.
    """
    folder = find_by_name(PACKAGE, settings.name, "algorithm.name").__name__
    return importlib.import_module(f"{folder}.algorithm").Algorithm(settings, packed)


def tap_layers(name: str, target: Any, chosen: Sequence[int] | None) -> tuple[int, ...]:
    """The layers of a target whose outputs an algorithm's drafts read.

    Args:
        target: its configuration.
        chosen: by the user, in place of the algorithm's default.

    Raises:
        InputError: there is no such algorithm, or they are no taps for it.
    """
    algorithm = make(settings_of(name).model_validate({}), packed=True)
    return algorithm.tap_layers(target.num_hidden_layers, None if chosen is None else tuple(chosen))


def algorithm_of(architecture: ModuleType, config: Any = None) -> Algorithm:
    """The algorithm that a draft architecture is of, wherever its file lies.

    Args:
        config: of a draft, whose settings it then has as far as the draft holds them; the others are the defaults.
    """
    for name, folder in parts_of(PACKAGE):
        if any(module is architecture for _, module in parts_of(f"{folder.__name__}.drafts")):
            settings = settings_of(name)
            held = () if config is None else settings.in_draft
            return make(settings(name=name, **{field: getattr(config, field) for field in held}), packed=True)
    raise AssertionError(f"{architecture.__name__} is no draft architecture of an algorithm")


def draft_packages() -> list[str]:
    """The packages of draft architectures of all algorithms."""
    return [f"{module.__name__}.drafts" for _, module in parts_of(PACKAGE)]
