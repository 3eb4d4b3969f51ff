"""DFlash2 as an algorithm: what `interfaces.Algorithm` asks for, where it is not DFlash's.

Shape letters: B batch, A blocks, S slots of a block, R = A S rows, Q slots that predict, D draft width, E width of the
codebooks, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from flaxdraft.algorithms.dflash.block_attention import Keys
from flaxdraft.algorithms.dflash.layout import Layout, layout_of
from flaxdraft.algorithms.dflash.objective import block_sums, decayed
from flaxdraft.algorithms.dflash.scheduled import ScheduledAlgorithm
from flaxdraft.algorithms.dflash2.draft import DFlash2Draft
from flaxdraft.algorithms.dflash2.drafter import DFlash2Drafter
from flaxdraft.algorithms.dflash2.schedule import selector_share
from flaxdraft.algorithms.dflash2.settings import Settings
from flaxdraft.algorithms.dflash2.sums import DFlash2Sums
from flaxdraft.interfaces import Example
from flaxdraft.ops.candidate_head import Candidates, candidate_cross_entropy
from flaxdraft.ops.corrected_head import Heads, Inputs, Labels
from flaxdraft.ops.rows import take_rows
from flaxdraft.serving.contract import Contract

NO_PRODUCTS = ("embed_tokens", "lm_head", "base_kernel")  # codebooks, of which rows are looked up; channel by channel


class Scores(NamedTuple):
    """What is known of every slot of some blocks."""

    asked_BAS: Bool[Array, "B A S"]  # whether there is a right token
    weight_BAS: Float[Array, "B A S"]
    loss_BAS: Float[Array, "B A S"]  # cross entropy of the logits
    base_hit_BAS: Bool[Array, "B A S"]
    # Cross entropy among the candidates; 0 where the right token is not among them.
    choice_loss_BAS: Float[Array, "B A S"]
    hit_BAS: Bool[Array, "B A S"]
    covered_BAS: Bool[Array, "B A S"]  # the right token is a candidate


@dataclasses.dataclass(frozen=True)
class Algorithm(ScheduledAlgorithm):
    """DFlash's blocks, with a selector that reads the text's own tokens in training and in the walk, and the draft's
    proposals in decoding: on the target's own answers these are the same up to the first wrong one."""

    settings: Settings

    @property
    def layout(self) -> Layout:
        return layout_of(self.settings.block_size, sample_from_anchor=False)

    def share_at(self, step: Int[Array, ""]) -> Float[Array, ""]:
        return selector_share(self.settings, step)

    def with_share(
        self, draft: DFlash2Draft, head_VD: Float[Array, "V D"], example: Example, text: list[Keys],
        anchor_BA: Int[Array, "B A"], share: Float[Array, ""],
    ) -> tuple[Float[Array, ""], Scores]:  # fmt: skip
        settings, batch = self.settings, example.batch
        states_BRD = self.states(draft, batch, text, anchor_BA)
        label_BAS, asked_BAS = self.asked(batch, anchor_BA)
        flat, apart = lambda x: x.reshape(states_BRD.shape[:2]), lambda x: x.reshape(label_BAS.shape)
        before_S = jnp.maximum(jnp.arange(settings.block_size) - 1, 0)  # of the anchor's slot nothing is asked
        before_BR = take_rows(batch.tokens_BT, flat(anchor_BA[:, :, None] + before_S[None, None]))
        read_BRD = jax.lax.stop_gradient(states_BRD) if settings.selector_stop_gradient else states_BRD
        latents_BRE = draft.selector.latents(read_BRD, before_BR)
        wide = jnp.promote_types(states_BRD.dtype, jnp.float32)
        weight_BAS = decayed(settings.decay_gamma, self.layout, asked_BAS.astype(wide))
        insert = settings.selector_missing_label == "last_candidate"
        total, (unary, choice) = candidate_cross_entropy(
            Candidates(draft.config.selector_top_k, not settings.selector_stop_gradient, insert),
            self.how(draft, anchor_BA), Inputs(states_BRD, latents_BRE),
            Heads(head_VD, draft.selector.head_VE()), Labels(flat(label_BAS), flat(weight_BAS)),
            flat(asked_BAS), share,
        )  # fmt: skip
        return total, Scores(asked_BAS, weight_BAS, *map(apart, (*unary, *choice)))

    def summed(self, scores: Scores) -> DFlash2Sums:
        """In evaluation the selector's loss counts in full."""
        loss_BAS = scores.loss_BAS + self.settings.selector_alpha * scores.choice_loss_BAS
        blocks = block_sums(scores.weight_BAS, self.counted, scores.asked_BAS, loss_BAS, scores.hit_BAS)
        base_hit_Q, covered_Q = (
            jnp.sum(x[:, :, self.counted], axis=(0, 1), dtype=jnp.int32)
            for x in (scores.base_hit_BAS, scores.covered_BAS)
        )
        return DFlash2Sums(blocks, base_hit_Q, covered_Q)

    def flops(self, params: nnx.State, frozen: nnx.State, example: Example) -> float:
        """Of a candidate one row of the codebook is read and multiplied, as a key in attention is, which counts here as
        little."""
        products = [(path, x) for path, x in nnx.to_flat_state(params) if path[-1] not in NO_PRODUCTS]
        found = super().flops(nnx.from_flat_state(products), frozen, example)
        if not self.settings.selector_stop_gradient:
            return found
        num_slots = example.chosen.anchor_BA.size * self.settings.block_size
        return found - 2.0 * math.prod(params["selector"]["projection"]["kernel"].shape) * num_slots

    def drafter(self) -> DFlash2Drafter:
        return DFlash2Drafter(self.layout)

    def serving(self) -> Contract:
        """The contract of its exports."""
        from flaxdraft.algorithms.dflash2.serving import contract  # tables and rules that training never reads

        return contract
