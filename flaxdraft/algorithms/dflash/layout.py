"""What the slots of a block hold and predict.

A block of S slots begins at its anchor, the newest token: slot 0 holds that token, the others hold mask tokens. Slot k
stands at the anchor's position + k. What it predicts is the layout; drafters of this family differ in it, and a draft
that is served in another layout than it was trained in proposes nonsense without any error.

Shape letters: B batch, T time, A blocks, S slots of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from flaxdraft.interfaces import Batch
from flaxdraft.ops.rows import take_rows


class Layout(NamedTuple):
    """Slot k predicts the token `shift` + k places behind the anchor; slots before `first` predict nothing."""

    block_size: int
    shift: int
    first: int

    @property
    def num_predicted(self) -> int:
        """Slots that predict; the first of them predicts the token behind the anchor."""
        return self.block_size - self.first


def layout_of(block_size: int, sample_from_anchor: bool) -> Layout:
    """In DFlash's own layout slot k predicts the token at its own place, and the anchor's slot predicts nothing. In
    that of drafts that sample from the anchor every slot predicts the token behind its place."""
    return Layout(block_size, shift=1, first=0) if sample_from_anchor else Layout(block_size, shift=0, first=1)


class Wanted(NamedTuple):
    """What is asked of each slot."""

    label_BAS: Int[Array, "B A S"]  # the right token
    asked_BAS: Bool[Array, "B A S"]  # whether there is one


def wanted(batch: Batch, anchor_BA: Int[Array, "B A"], layout: Layout, *, stop_at_hole: bool) -> Wanted:
    """A slot is asked for a token that the assistant produced, in the anchor's document and in the row.

    Args:
        anchor_BA: entries >= T are padding.
        stop_at_hole: ask nothing after a token that is not the assistant's; otherwise that token alone is left out.
    """
    (num_batch, num_blocks), size = anchor_BA.shape, layout.block_size
    place_S = jnp.arange(size)
    rows_BR = (anchor_BA[:, :, None] + layout.shift + place_S[None, None]).reshape(num_batch, num_blocks * size)
    label, assistant, segment = (
        take_rows(x, rows_BR).reshape(num_batch, num_blocks, size)
        for x in (batch.tokens_BT, batch.assistant_BT, batch.segments_BT)
    )
    of_anchor_BA1 = take_rows(batch.segments_BT, anchor_BA)[:, :, None]
    usable_BAS = assistant & (segment == of_anchor_BA1) & (of_anchor_BA1 > 0)
    if stop_at_hole:
        # Slots that predict nothing break no run.
        usable_BAS = jnp.cumprod(usable_BAS | (place_S < layout.first)[None, None], axis=2).astype(bool) & usable_BAS
    return Wanted(label, usable_BAS & (place_S >= layout.first)[None, None])
