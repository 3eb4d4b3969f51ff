"""What the loss is made of. Shape letters: B batch, A blocks, Q slots of a block that predict."""

from __future__ import annotations

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockSums:
    """What is summed up over blocks."""

    loss: Float[Array, ""]  # weighted cross entropies
    weight: Float[Array, ""]  # what they are divided by: the weights, or as many as there are batch rows
    asked_Q: Int[Array, " Q"]  # slots for which there is a right token
    hit_Q: Int[Array, " Q"]
    prefix_hit_Q: Int[Array, " Q"]  # hits here and at all before
    num_blocks: Int[Array, ""]  # of which anything is asked

    def __add__(self, other: BlockSums) -> BlockSums:
        return jax.tree.map(jnp.add, self, other)

    def asking(self, asked_BAQ: Bool[Array, "B A Q"]) -> BlockSums:
        """The same sums where other slots count as asked."""
        count = lambda x: jnp.sum(x, axis=(0, 1), dtype=jnp.int32)  # noqa: E731
        blocks = count(jnp.any(asked_BAQ, axis=2))
        return dataclasses.replace(self, asked_Q=count(asked_BAQ), num_blocks=blocks)

    def terms(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        return self.loss, jnp.maximum(self.weight, 1.0)

    def figures(self) -> dict[str, float | list[float]]:
        """accuracy: of each slot. mean_over_rows: 1 + the slots that are right from the first on, mean over blocks;
        larger than the walk, since decoding begins more blocks at hard places."""
        return {
            "accuracy": (self.hit_Q / np.maximum(self.asked_Q, 1)).tolist(),
            "mean_over_rows": float(1 + self.prefix_hit_Q.sum() / max(int(self.num_blocks), 1)),
        }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadSums:
    """Of drafts with a head that goes along the block; an algorithm adds what it counts besides."""

    blocks: BlockSums  # with the head; its loss is the whole one

    def __add__(self, other: Self) -> Self:
        return jax.tree.map(jnp.add, self, other)

    def trained_by(self, loss: Float[Array, ""]) -> Self:
        """The same with the loss that has a gradient."""
        return dataclasses.replace(self, blocks=dataclasses.replace(self.blocks, loss=loss))

    def terms(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        return self.blocks.terms()

    def figures(self) -> dict[str, float | list[float]]:
        """Besides those of blocks token_accuracy: hits over tokens, of all slots together."""
        return self.blocks.figures() | {"token_accuracy": self.share_of_tokens(self.blocks.hit_Q)}

    def share_of_tokens(self, count: Int[Array, ...]) -> float:
        """A count, added up over slots, by the tokens that are asked for."""
        return float(np.sum(count) / max(int(self.blocks.asked_Q.sum()), 1))
