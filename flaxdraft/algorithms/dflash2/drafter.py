"""How the draft proposes: one pass over a block, then the selector from slot to slot. See `interfaces.Drafter`.

Shape letters: B rows, Q proposals, K candidates, D draft width, E width of the codebooks, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flaxdraft.algorithms.dflash.drafter import BlockDrafter
from flaxdraft.algorithms.dflash2.draft import DFlash2Draft
from flaxdraft.interfaces import Chooser
from flaxdraft.ops import vocabulary_axis


@dataclasses.dataclass(frozen=True)
class DFlash2Drafter(BlockDrafter):
    """What a slot proposes is one of its candidates, and depends on what the slot before it proposes; it is drawn from
    a distribution that says so."""

    def chosen(
        self, draft: DFlash2Draft, hidden_BQD: Float[Array, "B Q D"], token_B: Int[Array, " B"], choose: Chooser
    ) -> list[tuple[Int[Array, " B"], Any]]:  # fmt: skip
        logits_BQV, selector, chosen = draft.logits(hidden_BQD), draft.selector, []
        rows_B1 = jnp.arange(len(token_B))[:, None]
        for j in range(hidden_BQD.shape[1]):
            logit_BK, id_BK = vocabulary_axis.top(logits_BQV[:, j], draft.config.selector_top_k, None)
            latent_B1E = selector.latents(hidden_BQD[:, j : j + 1], token_B[:, None])
            score_BK = selector.scores(logit_BK, id_BK, latent_B1E[:, 0])
            # No other token is proposed.
            score_BV = jnp.full_like(logits_BQV[:, j], -jnp.inf).at[rows_B1, id_BK].set(score_BK)
            chosen.append(choose(score_BV, j))
            token_B = chosen[-1][0]
        return chosen
