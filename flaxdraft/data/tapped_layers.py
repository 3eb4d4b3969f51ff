"""The layers whose outputs a feature store holds, where no configuration names an algorithm."""

from __future__ import annotations

from collections.abc import Sequence

from flaxdraft import algorithms
from flaxdraft.targets import OpenedTarget


def tapped_layers(opened: OpenedTarget, chosen: Sequence[int] | None = None) -> tuple[int, ...]:
    """`chosen`, or the default of the default algorithm for this target.

    Raises:
        InputError: they are no taps for that algorithm.
    """
    algorithm = algorithms.make(algorithms.settings_of(algorithms.DEFAULT)(), packed=True)
    return algorithm.tap_layers(opened.config().num_hidden_layers, None if chosen is None else tuple(chosen))
