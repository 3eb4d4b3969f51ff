"""How the draft proposes: one pass over a block, then the Markov head from slot to slot; what it does not trust is not
proposed. See `interfaces.Drafter`.

Shape letters: B rows, Q proposals, D draft width.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flaxdraft.algorithms.dflash.drafter import BlockDrafter
from flaxdraft.algorithms.dspark.draft import DSparkDraft
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Chooser


def trusted(logit: Float[Array, "*lead Q"] | None, threshold: float) -> Bool[Array, "*lead Q"]:
    """The slots before the first one whose confidence, the sigmoid of a logit, is less than the threshold.

    Raises:
        InputError: the draft has no confidence head.
    """
    if logit is None:
        raise InputError(
            f"algorithm.confidence_threshold: found {threshold}, but the draft has no confidence head; leave it at 0, "
            "or train with draft.fields={enable_confidence_head: true}"
        )
    return jnp.cumprod(logit >= math.log(threshold / (1 - threshold)), axis=-1, dtype=jnp.int32).astype(bool)


@dataclasses.dataclass(frozen=True)
class DSparkDrafter(BlockDrafter):
    """What a slot proposes depends on what the slot before it does, and is drawn from a distribution that says so."""

    confidence_threshold: float = 0.0

    def chosen(
        self, draft: DSparkDraft, hidden_BQD: Float[Array, "B Q D"], token_B: Int[Array, " B"], choose: Chooser
    ) -> list[tuple[Int[Array, " B"], Any]]:  # fmt: skip
        logits_BQV, head, chosen = draft.logits(hidden_BQD), draft.markov, []
        state_BE = head.start(len(token_B))
        for j in range(hidden_BQD.shape[1]):
            before_B1E = head.embed(token_B[:, None])
            state_BE, latent_B1E = head.step(state_BE, before_B1E, hidden_BQD[:, j : j + 1])
            chosen.append(choose(logits_BQV[:, j] + head.logits(latent_B1E)[:, 0], j))
            token_B, _ = chosen[-1]
        return chosen

    def standing(
        self, draft: DSparkDraft, hidden_BQD: Float[Array, "B Q D"], before_BQ: Int[Array, "B Q"]
    ) -> Int[Array, " B"] | None:  # fmt: skip
        if not self.confidence_threshold:
            return None
        head, before_BQE = draft.confidence, draft.markov.embed(before_BQ)
        logit_BQ = None if head is None else head(hidden_BQD, before_BQE)
        return jnp.sum(trusted(logit_BQ, self.confidence_threshold), axis=1, dtype=jnp.int32)
