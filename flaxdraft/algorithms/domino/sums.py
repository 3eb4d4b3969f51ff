"""What the loss is made of, and the accuracies of teacher forcing. Shape letters: Q slots of a block that predict."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from flaxdraft.algorithms.dflash.sums import HeadSums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DominoSums(HeadSums):
    """Sums over blocks."""

    base_hit_Q: Int[Array, " Q"]  # without the head
    run: Int[Array, ""]  # see `runs`
    base_run: Int[Array, ""]

    def figures(self) -> dict[str, float | list[float]]:
        """base_token_accuracy: hits without the head. teacher_forced_length: 1 + the run of right slots from the first
        on, mean over blocks. It is no accept length: the head reads the text's own tokens, slots for which there is no
        token break no run, and with shifted labels training counts one slot more than engines propose. Other trainers
        call it so."""
        num_blocks = max(int(self.blocks.num_blocks), 1)
        return super().figures() | {
            "base_token_accuracy": self.share_of_tokens(self.base_hit_Q),
            "teacher_forced_length": float(1 + self.run / num_blocks),
            "base_teacher_forced_length": float(1 + self.base_run / num_blocks),
        }


def runs(asked_BAQ: Bool[Array, "B A Q"], hit_BAQ: Bool[Array, "B A Q"]) -> Int[Array, ""]:
    """The right slots before the first wrong one, added up over blocks; of slots of which nothing is asked none counts
    and none breaks a run."""
    unbroken_BAQ = jnp.cumprod(hit_BAQ | ~asked_BAQ, axis=2, dtype=jnp.int32)
    return jnp.sum(unbroken_BAQ * asked_BAQ, dtype=jnp.int32)
