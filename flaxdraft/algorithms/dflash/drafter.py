"""How the draft proposes: one pass over a block. See `interfaces.Drafter`.

Position p of a text has slot p of the cache. The cache holds keys and values of the text alone, made of the target's
states; those of a block are never kept. The newest token's own states come with the next target pass, so a block sees
what lies before the newest token, as in training.

Shape letters: B rows, T new positions, S slots of a block, K tapped layers, E target width, D draft width, Q proposals.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flaxdraft.algorithms.dflash.block_attention import Keys, Way
from flaxdraft.algorithms.dflash.draft import BlockDraft, Places
from flaxdraft.algorithms.dflash.layout import Layout
from flaxdraft.interfaces import Chooser, Proposal
from flaxdraft.nn.rope import turning_positions


@dataclasses.dataclass(frozen=True)
class BlockDrafter:
    """All proposals at once."""

    layout: Layout

    trees = False

    @property
    def most_tokens(self) -> int:
        return self.layout.num_predicted

    def start(self, draft: BlockDraft, num_rows: int, num_slots: int) -> list[Keys]:
        """Empty; the shapes come from the draft's own projections."""
        c = draft.config
        taps = jax.ShapeDtypeStruct((num_rows, num_slots, c.num_taps, c.target_hidden_size), draft.precision.compute)
        positions = jax.ShapeDtypeStruct((num_rows, num_slots), jnp.int32)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(draft.read, taps, positions))

    def read(
        self, draft: BlockDraft, state: list[Keys], taps_BTKE: Float[Array, "B T K E"], next_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"], last_B: Int[Array, " B"],
    ) -> list[Keys]:  # fmt: skip
        rows_B1 = jnp.arange(len(taps_BTKE))[:, None]
        found = draft.read(taps_BTKE, turning_positions(positions_BT, state[0].k_BTKH.shape[1]))
        return jax.tree.map(lambda kept, new: kept.at[rows_B1, positions_BT].set(new, mode="drop"), state, found)

    def propose(
        self, draft: BlockDraft, state: list[Keys], newest_B: Int[Array, " B"], token_B: Int[Array, " B"],
        num_tokens: int, choose: Chooser,
    ) -> tuple[list[Keys], Proposal]:  # fmt: skip
        anchor_B1 = newest_B[:, None]
        places = Places(anchor_B1, jnp.zeros_like(anchor_B1), turning_positions(anchor_B1, state[0].k_BTKH.shape[1]))
        hidden_BSD = draft(token_B[:, None], state, places, Way("dense"))
        first = self.layout.first
        hidden_BQD = hidden_BSD[:, first : first + num_tokens]
        chosen = self.chosen(draft, hidden_BQD, token_B, choose)
        ids_BQ, q_BQV = jax.tree.map(lambda *each: jnp.stack(each, axis=1), *chosen)
        before_BQ = jnp.concatenate([token_B[:, None], ids_BQ[:, :-1]], axis=1)
        return state, Proposal(ids_BQ, q_BQV, self.standing(draft, hidden_BQD, before_BQ))

    def standing(
        self, draft: Any, hidden_BQD: Float[Array, "B Q D"], before_BQ: Int[Array, "B Q"]
    ) -> Int[Array, " B"] | None:
        """How many of its proposals each row stands by; None: by all.

        Args:
            before_BQ: the token before each slot that proposes.
        """
        return None

    def chosen(
        self, draft: Any, hidden_BQD: Float[Array, "B Q D"], token_B: Int[Array, " B"], choose: Chooser
    ) -> list[tuple[Int[Array, " B"], Any]]:
        """What `choose` says of each slot. Here no slot depends on what another one proposes; drafters with a head that
        reads it have their own.

        Args:
            hidden_BQD: the head's input at the slots that propose.
            token_B: the newest token.
        """
        logits_BQV = draft.logits(hidden_BQD)
        return [choose(logits_BQV[:, j], j) for j in range(hidden_BQD.shape[1])]
