"""How the draft proposes: one pass over a block. See `interfaces.Drafter`.

Shape letters: B rows, T new positions, S slots, K tapped layers, D width, Q proposals, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from blocky.draft import BlockDraft, Text
from flaxdraft.interfaces import Chooser, Proposal


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Read:
    """The text so far."""

    context_BSD: Float[Array, "B S D"]


@dataclasses.dataclass(frozen=True)
class BlockDrafter:
    """All proposals at once."""

    block_size: int

    trees = False

    @property
    def most_tokens(self) -> int:
        return self.block_size - 1

    def start(self, draft: BlockDraft, num_rows: int, num_slots: int) -> Read:
        return Read(jnp.zeros((num_rows, num_slots, draft.config.hidden_size), draft.precision.compute))

    def read(
        self, draft: BlockDraft, state: Read, taps_BTKE: Float[Array, "B T K D"], next_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"], last_B: Int[Array, " B"],
    ) -> Read:  # fmt: skip
        rows_B1 = jnp.arange(len(taps_BTKE))[:, None]
        return Read(state.context_BSD.at[rows_B1, positions_BT].set(draft.context(taps_BTKE), mode="drop"))

    def propose(
        self, draft: BlockDraft, state: Read, newest_B: Int[Array, " B"], token_B: Int[Array, " B"], num_tokens: int,
        choose: Chooser,
    ) -> tuple[Read, Proposal]:  # fmt: skip
        num_rows, num_slots, _ = state.context_BSD.shape
        slots_BS = jnp.broadcast_to(jnp.arange(num_slots)[None], (num_rows, num_slots))
        text, visible_BAS = Text(state.context_BSD, slots_BS), (slots_BS < newest_B[:, None])[:, None]
        logits_BQV = draft.logits(token_B[:, None], newest_B[:, None], text, visible_BAS)[:, 0]
        chosen = [choose(logits_BQV[:, j], j) for j in range(num_tokens)]
        return state, Proposal(*jax.tree.map(lambda *each: jnp.stack(each, axis=1), *chosen))
