"""Algorithms whose loss has a part that counts more or less from step to step.

Shape letters: B batch, A blocks, D draft width, V vocabulary.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flaxdraft.algorithms.dflash import algorithm as dflash
from flaxdraft.algorithms.dflash.block_attention import Keys
from flaxdraft.algorithms.dflash.sums import HeadSums
from flaxdraft.interfaces import Example


@dataclasses.dataclass(frozen=True)
class ScheduledAlgorithm(dflash.Algorithm, abc.ABC):
    """The step is carried along, and says what share the part has."""

    @abc.abstractmethod
    def share_at(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """What the part counts in a step, from 0."""

    @abc.abstractmethod
    def with_share(
        self, draft: Any, head_VD: Float[Array, "V D"], example: Example, text: list[Keys],
        anchor_BA: Int[Array, "B A"], share: Float[Array, ""],
    ) -> tuple[Float[Array, ""], Any]:  # fmt: skip
        """The weighted losses of all slots, added up, and what is known of each."""

    def first_carry(self) -> Int[Array, ""]:
        return jnp.zeros((), jnp.int32)

    def next_carry(self, carry: Int[Array, ""], sums: Any, step: Int[Array, ""]) -> Int[Array, ""]:
        return step + 1

    def scored(
        self, draft: Any, head_VD: Float[Array, "V D"], example: Example, text: list[Keys], anchor_BA: Int[Array, "B A"]
    ) -> Any:
        """What is known of a slot does not depend on the share."""
        return self.with_share(draft, head_VD, example, text, anchor_BA, jnp.zeros(()))[1]

    def sums(self, draft: Any, example: Example, carry: Int[Array, ""]) -> HeadSums:
        text, anchor_BA = self.read(draft, example), example.chosen.anchor_BA
        share = self.share_at(carry)
        total, scores = self.with_share(draft, draft.head_VD(), example, text, anchor_BA, share)
        return self.summed(scores).trained_by(total)
