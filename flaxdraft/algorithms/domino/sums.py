"""What the loss is made of, and the accuracies of teacher forcing. Shape letters: Q slots of a block that predict."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flaxdraft.algorithms.dflash.sums import BlockSums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DominoSums:
    """Sums over blocks."""

    blocks: BlockSums  # with the head; its loss is the whole one
    base_hit_Q: Int[Array, " Q"]  # without the head
    run: Int[Array, ""]  # see `runs`
    base_run: Int[Array, ""]

    def __add__(self, other: DominoSums) -> DominoSums:
        return jax.tree.map(jnp.add, self, other)

    def terms(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        return self.blocks.terms()

    def figures(self) -> dict[str, float | list[float]]:
        """Besides DFlash's: token_accuracy, hits over tokens, of all slots together, with the head and without it.
        teacher_forced_length: 1 + the run of right slots from the first on, mean over blocks. It is no accept length:
        the head reads the text's own tokens, slots for which there is no token break no run, and with shifted labels
        training counts one slot more than engines propose. Other trainers call it so."""
        blocks = self.blocks
        asked, num_blocks = max(int(blocks.asked_Q.sum()), 1), max(int(blocks.num_blocks), 1)
        return {
            **blocks.figures(),
            "token_accuracy": float(np.sum(blocks.hit_Q) / asked),
            "base_token_accuracy": float(np.sum(self.base_hit_Q) / asked),
            "teacher_forced_length": float(1 + self.run / num_blocks),
            "base_teacher_forced_length": float(1 + self.base_run / num_blocks),
        }


def runs(asked_BAQ: Bool[Array, "B A Q"], hit_BAQ: Bool[Array, "B A Q"]) -> Int[Array, ""]:
    """The right slots before the first wrong one, added up over blocks; of slots of which nothing is asked none counts
    and none breaks a run."""
    unbroken_BAQ = jnp.cumprod(hit_BAQ | ~asked_BAQ, axis=2, dtype=jnp.int32)
    return jnp.sum(unbroken_BAQ * asked_BAQ, dtype=jnp.int32)
