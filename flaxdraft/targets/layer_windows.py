"""Sliding windows of a target's layers, as its config.json says them: of all, of some, or of none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from flaxdraft.errors import InputError
from flaxdraft.files.through_an_engine import THROUGH_AN_ENGINE
from flaxdraft.nn.self_attention import Attend

SLIDING, FULL = "sliding_attention", "full_attention"
NO_WINDOW = 2**30  # beyond every length

Windows = tuple[int | None, ...]  # of each layer; None: it sees everything before it


def layer_windows(config: Mapping[str, Any], window: int | None, usual: Sequence[str]) -> Windows:
    """
    Args:
        window: what the family takes `sliding_window` for; None: there is none.
        usual: the kind of each layer where the config names none in `layer_types`.

    Raises:
        InputError: `layer_types` names no kind for each layer, or one that is unknown; a layer slides without a window.
    """
    kinds = config.get("layer_types") or usual
    if not isinstance(kinds, list | tuple) or len(kinds) != config["num_hidden_layers"]:
        raise InputError(
            f"target config: layer_types: found {kinds!r}, expected {SLIDING!r} or {FULL!r} for each of "
            f"{config['num_hidden_layers']} layers; fetch config.json again"
        )
    if unknown := [kind for kind in kinds if kind not in (SLIDING, FULL)]:
        raise InputError(
            f"target config: layer_types: found {unknown[0]!r}, only {SLIDING!r} and {FULL!r} are supported. "
            f"{THROUGH_AN_ENGINE}"
        )
    if SLIDING in kinds and (not isinstance(window, int) or window < 1):
        raise InputError(
            f"target config: sliding_window: found {window!r} with layers of {SLIDING}, expected a positive integer; "
            "fetch config.json again"
        )
    return tuple(window if kind == SLIDING else None for kind in kinds)


def windowed(attend: Attend, windows: Windows, number: Int[Array, ""]) -> Attend:
    """`attend` with the window of the layer of that number."""
    if all(window is None for window in windows):
        return attend
    sizes_L = jnp.asarray([NO_WINDOW if window is None else window for window in windows], jnp.int32)
    return partial(attend, window=sizes_L[number])
