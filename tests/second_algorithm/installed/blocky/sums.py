"""What the loss is made of. Shape letters: Q proposals of a block."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockSums:
    """Sums over blocks."""

    loss: Float[Array, ""]  # weighted cross entropies
    weight: Float[Array, ""]
    count_Q: Int[Array, " Q"]  # proposals that have a right answer
    hit_Q: Int[Array, " Q"]
    prefix_hit_Q: Int[Array, " Q"]  # hits here and at all before

    def __add__(self, other: BlockSums) -> BlockSums:
        return jax.tree.map(jnp.add, self, other)

    def terms(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        return self.loss, jnp.maximum(self.weight, 1.0)

    def figures(self) -> dict[str, float | list[float]]:
        count_Q = np.maximum(self.count_Q, 1)
        return {
            "accuracy": (self.hit_Q / count_Q).tolist(), "reached": (self.prefix_hit_Q / count_Q).tolist(),
            "mean_weight": float(self.weight / count_Q.sum()),
        }  # fmt: skip
