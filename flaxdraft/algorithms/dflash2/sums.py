"""What the loss is made of, and what is known of the selector under teacher forcing. Shape letters: Q slots of a block
that predict."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Int

from flaxdraft.algorithms.dflash.sums import HeadSums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DFlash2Sums(HeadSums):
    """Hits are those of what the selector chooses."""

    base_hit_Q: Int[Array, " Q"]  # the right token has the highest logit
    covered_Q: Int[Array, " Q"]  # it is a candidate

    def figures(self) -> dict[str, float | list[float]]:
        """base_token_accuracy: hits without the selector, which reads the text's own tokens. candidate_coverage: the
        share of tokens that are among their slots' candidates."""
        return super().figures() | {
            "base_token_accuracy": self.share_of_tokens(self.base_hit_Q),
            "candidate_coverage": self.share_of_tokens(self.covered_Q),
        }
