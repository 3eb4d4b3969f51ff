"""What a draft takes over from its target: the layers that it taps, the teacher, and the weights that it begins with.

Shape letters: E target width, W draft vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxdraft.errors import InputError
from flaxdraft.interfaces import EmbeddingAndHead, VocabMap

NUM_TAPS = 3


def three_taps(num_layers: int, chosen: tuple[int, ...] | None) -> tuple[int, ...]:
    """`chosen`, or the default that every server knows, 1, n//2-1, n-4.

    Raises:
        InputError: they are not three ascending layers of the model.
    """
    taps = (1, num_layers // 2 - 1, num_layers - 4) if chosen is None else chosen
    if len(taps) == NUM_TAPS and 0 <= taps[0] < taps[1] < taps[2] < num_layers:
        return taps
    advice = f"give target.tap_layers, for instance {[0, num_layers // 2, num_layers - 2]}"
    if num_layers < 4:
        advice = "a target needs at least 4 layers for three taps below its last"
    given = "the default layers" if chosen is None else "target.tap_layers:"
    raise InputError(f"{given} {list(taps)} are not three ascending layers of a {num_layers}-layer target; {advice}")


def head_rows(target: EmbeddingAndHead, vocab: VocabMap, dtype: Any) -> Float[Array, "W E"]:
    """The target's head rows of the draft vocabulary, which make the teacher's logits."""
    return target.head()[vocab.target_ids_W].astype(dtype)


def warm_start(draft: Any, target: EmbeddingAndHead, vocab: VocabMap) -> None:
    """Begins where the target ends: the head's rows and the final norm are the target's, and fc passes the highest
    tapped state on. The first hidden states then lie in the space that the head reads. Only where draft and target
    widths are equal."""
    width = target.config.hidden_size
    if draft.config.hidden_size != width:
        return
    draft.lm_head.kernel[...] = target.head()[vocab.target_ids_W].T.astype(draft.lm_head.kernel.dtype)
    draft.norm.scale[...] = target.final_norm().astype(draft.norm.scale.dtype)
    kernel = draft.fc.kernel[...]
    draft.fc.kernel[...] = kernel.at[2 * width :].add(jnp.eye(width, dtype=kernel.dtype))
