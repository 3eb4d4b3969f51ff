"""What the loss is made of. Shape letters: D depths."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DepthSums:
    """Sums over elements."""

    loss: Float[Array, ""]
    count: Int[Array, ""]  # of elements in the loss: those whose right token the draft vocabulary has
    asked_D: Int[Array, " D"]  # elements for which there is a right token
    hit_D: Int[Array, " D"]
    chain_D: Int[Array, " D"]  # elements for which there is one at all depths before, too
    prefix_hit_D: Int[Array, " D"]  # of these: hits here and at all depths before
    expected_accept: Float[Array, ""]  # sum over elements of sum_w min(p_full[w], q[w])

    def __add__(self, other: DepthSums) -> DepthSums:
        return jax.tree.map(jnp.add, self, other)

    def terms(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        return self.loss, jnp.maximum(self.count, 1.0)

    def figures(self) -> dict[str, float | list[float]]:
        """accuracy: of each depth. mean_over_rows: 1 + the shares of chains that are right from depth 0 on; larger than
        the walk's accept length, since decoding begins more chains at hard places. expected_accept: the mean of
        sum_w min(p, q)."""
        prefix_D = self.prefix_hit_D / np.maximum(self.chain_D, 1)
        return {
            "accuracy": (self.hit_D / np.maximum(self.asked_D, 1)).tolist(),
            "mean_over_rows": float(1 + prefix_D.sum()),
            "expected_accept": float(self.expected_accept / max(int(self.asked_D.sum()), 1)),
        }
