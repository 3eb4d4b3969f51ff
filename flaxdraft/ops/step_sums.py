"""What the loss of several steps is made of: sums, never means.

Shape letters: J steps.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# What a report calls the figures below.
TITLES = {
    "mean_over_rows": "1 + joint-prefix rates, mean over rows",
    "product_of_marginals":
        "sum of products of marginal accuracies (reference trainers' simulated accept length)",
    "accuracy": "top-1 accuracy",
    "expected_accept": "expected acceptance (sampling)",
}  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepSums:
    """Sums of each step: they are added over micro-batches and hosts and divided once."""

    loss_J: Float[Array, " J"]
    loss_count_J: Int[Array, " J"]  # supervised, teacher argmax in the draft vocabulary
    row_count_J: Int[Array, " J"]  # supervised
    hit_J: Int[Array, " J"]  # draft argmax is the target's argmax
    prefix_hit_J: Int[Array, " J"]  # hits at this step and all before
    expected_accept_J: Float[Array, " J"]  # sum over supervised rows of sum_w min(p_full[w], q[w])
    step_weights: tuple[float, ...] = dataclasses.field(metadata={"static": True})  # w_j of the J steps in the loss

    def __add__(self, other: StepSums) -> StepSums:
        return jax.tree.map(jnp.add, self, other)

    def terms(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """sum_j w_j S_j and sum_j w_j N_j; the loss is their quotient, the one division over whatever was summed."""
        weight_J = jnp.asarray(self.step_weights)
        count = jnp.sum(weight_J * self.loss_count_J)
        return jnp.sum(weight_J * self.loss_J), jnp.maximum(count, 1.0)

    def figures(self) -> dict[str, float | list[float]]:
        """Of sums on the host.

        accuracy: share of supervised rows whose top-1 is the target's. mean_over_rows: 1 + the joint-prefix rates over
        all rows, larger than the walk, since decoding visits hard places more. product_of_marginals: what reference
        trainers call the simulated accept length, the sum over chain lengths of products of the positions' accuracies,
        each taken over all rows; hits follow hits, so it is no accept length. expected_accept: mean of
        sum_w min(p, q).
        """
        rows_J = np.maximum(self.row_count_J, 1)
        accuracy_J = self.hit_J / rows_J
        return {
            "accuracy": accuracy_J.tolist(),
            "mean_over_rows": float(1 + np.sum(self.prefix_hit_J / rows_J)),
            "product_of_marginals": float(np.sum(np.cumprod(accuracy_J))),
            "expected_accept": (self.expected_accept_J / rows_J).tolist(),
        }
