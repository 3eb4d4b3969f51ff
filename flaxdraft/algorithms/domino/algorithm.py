"""Domino as an algorithm: what `interfaces.Algorithm` asks for, where it is not DFlash's.

Shape letters: B batch, A blocks, S slots of a block, D draft width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from flaxdraft.algorithms.dflash.block_attention import Keys
from flaxdraft.algorithms.dflash.layout import Layout, layout_of
from flaxdraft.algorithms.dflash.objective import block_sums, decayed
from flaxdraft.algorithms.dflash.scheduled import ScheduledAlgorithm
from flaxdraft.algorithms.domino.draft import DominoDraft
from flaxdraft.algorithms.domino.drafter import DominoDrafter
from flaxdraft.algorithms.domino.schedule import base_share
from flaxdraft.algorithms.domino.settings import Settings
from flaxdraft.algorithms.domino.sums import DominoSums, runs
from flaxdraft.interfaces import Example
from flaxdraft.ops.corrected_head import Heads, Inputs, Labels, corrected_cross_entropy
from flaxdraft.ops.rows import take_rows
from flaxdraft.serving.contract import Contract


class Scores(NamedTuple):
    """What is known of every slot of some blocks."""

    asked_BAS: Bool[Array, "B A S"]  # whether there is a right token
    weight_BAS: Float[Array, "B A S"]
    loss_BAS: Float[Array, "B A S"]  # cross entropy with the head
    hit_BAS: Bool[Array, "B A S"]
    base_hit_BAS: Bool[Array, "B A S"]  # without it


@dataclasses.dataclass(frozen=True)
class Algorithm(ScheduledAlgorithm):
    """DFlash's blocks, with a head that reads the text's own tokens in training and in the walk, and the draft's
    proposals in decoding: on the target's own answers these are the same up to the first wrong one."""

    settings: Settings

    @property
    def layout(self) -> Layout:
        return layout_of(self.settings.block_size, self.settings.shift_label)

    def share_at(self, step: Int[Array, ""]) -> Float[Array, ""]:
        return base_share(self.settings, step)

    def with_share(
        self, draft: DominoDraft, head_VD: Float[Array, "V D"], example: Example, text: list[Keys],
        anchor_BA: Int[Array, "B A"], share: Float[Array, ""],
    ) -> tuple[Float[Array, ""], Scores]:  # fmt: skip
        settings, batch = self.settings, example.batch
        states_BRD = self.states(draft, batch, text, anchor_BA)
        label_BAS, asked_BAS = self.asked(batch, anchor_BA)
        flat, apart = lambda x: x.reshape(states_BRD.shape[:2]), lambda x: x.reshape(label_BAS.shape)
        tokens_BAS = anchor_BA[:, :, None] + jnp.arange(settings.block_size)[None, None]
        latents_BRE = draft.latents(states_BRD, take_rows(batch.tokens_BT, flat(tokens_BAS)))
        wide = jnp.promote_types(states_BRD.dtype, jnp.float32)
        weight_BAS = decayed(settings.decay_gamma, self.layout, asked_BAS.astype(wide))
        total, (final, base) = corrected_cross_entropy(
            self.how(draft, anchor_BA), Inputs(states_BRD, latents_BRE),
            Heads(head_VD, draft.correction.head_VE()), Labels(flat(label_BAS), flat(weight_BAS)),
            flat(asked_BAS), share,
        )  # fmt: skip
        of_slots = map(apart, (*final, base.hit_BR))
        return total, Scores(asked_BAS, weight_BAS, *of_slots)

    def summed(self, scores: Scores) -> DominoSums:
        asked_BAS, weight_BAS, loss_BAS, hit_BAS, base_hit_BAS = scores
        blocks = block_sums(weight_BAS, self.counted, asked_BAS, loss_BAS, hit_BAS)
        asked, hit, base_hit = (x[:, :, self.counted] for x in (asked_BAS, hit_BAS, base_hit_BAS))
        base_hit_Q = jnp.sum(base_hit, axis=(0, 1), dtype=jnp.int32)
        return DominoSums(blocks, base_hit_Q, runs(asked, hit), runs(asked, base_hit))

    def flops(self, params: nnx.State, frozen: nnx.State, example: Example) -> float:
        """The tokens that the head reads are the target's embedding, of which nobody needs the gradient."""
        num_slots = example.chosen.anchor_BA.size * self.settings.block_size
        of_tokens = math.prod(params["correction"]["prefix_gru"]["input_proj"]["kernel"].shape)
        return super().flops(params, frozen, example) - 2.0 * of_tokens * num_slots

    def drafter(self) -> DominoDrafter:
        return DominoDrafter(self.layout)

    def serving(self) -> Contract:
        """The contract of its exports."""
        from flaxdraft.algorithms.domino.serving import contract  # tables and rules that training never reads

        return contract
