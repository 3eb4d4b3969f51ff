"""The layers of a target whose outputs a draft reads."""

from __future__ import annotations

from flaxdraft.errors import InputError

MOST_TAPS = 5


def default_taps(num_layers: int) -> tuple[int, ...]:
    """The outputs of layers that lie evenly between the second layer and the third from the end. SpecForge taps these
    five for a draft of five layers, which nearly all published drafts have; here every draft does. Small targets have
    fewer.

    Raises:
        InputError: the target has fewer than four layers.
    """
    if num_layers < 4:
        raise InputError(
            f"the default layers need a target of at least 4, found {num_layers}; give target.tap_layers, ascending "
            "layers of it"
        )
    return tuple(sorted({round(1 + i * (num_layers - 4) / (MOST_TAPS - 1)) for i in range(MOST_TAPS)}))
