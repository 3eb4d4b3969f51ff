"""What the loss is made of, and what is known of the selector under teacher forcing. Shape letters: Q slots of a block
that predict."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flaxdraft.algorithms.dflash.sums import BlockSums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DFlash2Sums:
    """Sums over blocks."""

    blocks: BlockSums  # of what the selector chooses; its loss is the whole one
    base_hit_Q: Int[Array, " Q"]  # the right token has the highest logit
    covered_Q: Int[Array, " Q"]  # it is a candidate

    def __add__(self, other: DFlash2Sums) -> DFlash2Sums:
        return jax.tree.map(jnp.add, self, other)

    def terms(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        return self.blocks.terms()

    def figures(self) -> dict[str, float | list[float]]:
        """Besides DFlash's, of all slots together: token_accuracy, hits over tokens, by the selector and without it;
        candidate_coverage, the share of tokens that are among their slots' candidates. The selector reads the text's
        own tokens."""
        blocks = self.blocks
        asked = max(int(blocks.asked_Q.sum()), 1)
        return {
            **blocks.figures(),
            "token_accuracy": float(np.sum(blocks.hit_Q) / asked),
            "base_token_accuracy": float(np.sum(self.base_hit_Q) / asked),
            "candidate_coverage": float(np.sum(self.covered_Q) / asked),
        }
