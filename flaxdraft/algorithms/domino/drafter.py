"""How the draft proposes: one pass over a block, then the head from slot to slot. See `interfaces.Drafter`.

Shape letters: B rows, Q proposals, D draft width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtyping import Array, Float, Int

from flaxdraft.algorithms.dflash.drafter import BlockDrafter
from flaxdraft.algorithms.domino.draft import DominoDraft
from flaxdraft.interfaces import Chooser


@dataclasses.dataclass(frozen=True)
class DominoDrafter(BlockDrafter):
    """What a slot proposes depends on what the slots before it do, and is drawn from a distribution that says so."""

    @property
    def most_tokens(self) -> int:
        """As engines have it; with shifted labels the last slot, which is trained, proposes nothing."""
        return self.layout.block_size - 1

    def chosen(
        self, draft: DominoDraft, hidden_BQD: Float[Array, "B Q D"], token_B: Int[Array, " B"], choose: Chooser
    ) -> list[tuple[Int[Array, " B"], Any]]:  # fmt: skip
        logits_BQV, head, chosen = draft.logits(hidden_BQD), draft.correction, []
        state_BG = head.prefix_gru.start(len(token_B))
        for j in range(hidden_BQD.shape[1]):
            state_BG, logits_BV = head.prefix_gru.step(state_BG, draft.embed(token_B[:, None])[:, 0]), logits_BQV[:, j]
            if j >= draft.config.pure_draft_prefix_len:
                latent_B1E = head.latents(hidden_BQD[:, j : j + 1], state_BG[:, None])
                logits_BV = logits_BV + head.logits(latent_B1E)[:, 0]
            chosen.append(choose(logits_BV, j))
            token_B = chosen[-1][0]
        return chosen
