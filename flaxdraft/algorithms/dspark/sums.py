"""What the loss is made of, and what evaluation says of the confidence. Shape letters: B batch, A blocks, Q slots of a
block that predict, G temperatures."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flaxdraft.algorithms.dflash.sums import HeadSums

# Among which a slot's is chosen: from 1/8 to 8.
TEMPERATURES = tuple(float(2 ** (i / 8)) for i in range(-24, 25))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConfidenceSums:
    """Of a draft that has the head."""

    loss: Float[Array, ""]  # weighted cross entropies with the probability that the target accepts
    error: Float[Array, ""]  # weighted distances from it
    surprise_GQ: Float[Array, "G Q"] | None  # see `surprise`; None in training


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DSparkSums(HeadSums):
    """Sums over blocks."""

    text: Float[Array, ""]  # weighted cross entropies
    distance: Float[Array, ""]  # weighted distances of the draft's distributions from the target's
    expected: Float[Array, ""]  # draft tokens that sampled verification would accept, in expectation
    teacher_hit: Int[Array, ""]
    confidence: ConfidenceSums | None

    def figures(self) -> dict[str, float | list[float]]:
        """text_loss, distance_loss and confidence_loss, the three parts before their shares. expected_length: 1 + the
        draft tokens that sampled verification would accept, mean over blocks (reference trainers' tau), teacher-forced.
        teacher_accuracy: how often the target's likeliest token is the text's; on its own greedy answers always, unless
        the teacher is of another row or was not normed. confidence_temperatures: of each slot, see
        `best_temperatures`."""
        weight, num_blocks = max(float(self.blocks.weight), 1.0), max(int(self.blocks.num_blocks), 1)
        found = super().figures() | {
            "teacher_accuracy": self.share_of_tokens(self.teacher_hit),
            "text_loss": float(self.text / weight), "distance_loss": float(self.distance / weight),
            "expected_length": float(1 + self.expected / num_blocks),
        }  # fmt: skip
        if (own := self.confidence) is not None:
            found |= {"confidence_loss": float(own.loss / weight), "confidence_error": float(own.error / weight)}
            if own.surprise_GQ is not None:
                found["confidence_temperatures"] = best_temperatures(np.asarray(own.surprise_GQ))
        return found


def surprise(
    logit_BAQ: Float[Array, "B A Q"], asked_BAQ: Bool[Array, "B A Q"], hit_BAQ: Bool[Array, "B A Q"]
) -> Float[Array, "G Q"]:
    """What greedy verification says of the confidence at each temperature: the cross entropy of each slot with whether
    it is accepted, added up over the blocks in which all slots before are. (The chance that a whole run is accepted is
    the product along it, so slots are fitted one behind the other.) Sums, which add up over batches and hosts."""
    reached_BAQ = jnp.pad(
        jnp.cumprod(hit_BAQ, axis=2, dtype=jnp.int32)[:, :, :-1], ((0, 0), (0, 0), (1, 0)), constant_values=1
    )
    counts_BAQ = (reached_BAQ * asked_BAQ).astype(logit_BAQ.dtype)

    def at(temperature):
        loss_BAQ = binary_cross_entropy(logit_BAQ / temperature, hit_BAQ.astype(logit_BAQ.dtype))
        return jnp.sum(counts_BAQ * loss_BAQ, axis=(0, 1))

    return jax.lax.map(at, jnp.asarray(TEMPERATURES, logit_BAQ.dtype))


def binary_cross_entropy(logit: Float[Array, "*shape"], target: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jax.nn.softplus(logit) - target * logit


def best_temperatures(surprise_GQ: Float[np.ndarray, "G Q"]) -> list[float]:
    """Of each slot, by which the confidence's logit is divided before its sigmoid; 1 for a slot that was never
    reached."""
    chosen_Q = np.asarray(TEMPERATURES)[np.argmin(surprise_GQ, axis=0)]
    return np.where(np.any(surprise_GQ > 0, axis=0), chosen_Q, 1.0).tolist()
