"""DSpark as an algorithm: what `interfaces.Algorithm` asks for, where it is not DFlash's.

Shape letters: B batch, A blocks, S slots of a block, R = A S, D draft width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from flaxdraft.algorithms.dflash import algorithm as dflash
from flaxdraft.algorithms.dflash.block_attention import Keys
from flaxdraft.algorithms.dflash.layout import Layout, layout_of
from flaxdraft.algorithms.dflash.objective import block_sums, decayed
from flaxdraft.algorithms.dspark.draft import DSparkDraft
from flaxdraft.algorithms.dspark.drafter import DSparkDrafter, trusted
from flaxdraft.algorithms.dspark.losses import Asked, Shares, text_and_teacher
from flaxdraft.algorithms.dspark.settings import Settings
from flaxdraft.algorithms.dspark.sums import ConfidenceSums, DSparkSums, binary_cross_entropy, surprise
from flaxdraft.interfaces import Example
from flaxdraft.ops.corrected_head import Heads, Inputs, corrected
from flaxdraft.ops.rows import take_rows
from flaxdraft.serving.contract import Contract


class Scores(NamedTuple):
    """What is known of every slot of some blocks."""

    asked_BAS: Bool[Array, "B A S"]  # whether there is a right token
    weight_BAS: Float[Array, "B A S"]
    loss_BAS: Float[Array, "B A S"]  # see `losses.Known`
    hit_BAS: Bool[Array, "B A S"]
    distance_BAS: Float[Array, "B A S"]
    teacher_hit_BAS: Bool[Array, "B A S"]
    confidence_BAS: Float[Array, "B A S"] | None  # logits; None: the draft has no such head


@dataclasses.dataclass(frozen=True)
class Algorithm(dflash.Algorithm):
    """DFlash's blocks, of which every slot predicts, with heads that read the text's own tokens in training and in the
    walk, and the draft's proposals in decoding: on the target's own answers these are the same up to the first wrong
    one."""

    settings: Settings

    needs = ("taps_BTKE", "last_BTE")

    @property
    def layout(self) -> Layout:
        return layout_of(self.settings.block_size, sample_from_anchor=True)

    @property
    def stops_at_hole(self) -> bool:
        return True

    def _scored(
        self, draft: DSparkDraft, head_VD: Float[Array, "V D"], example: Example, text: list[Keys],
        anchor_BA: Int[Array, "B A"],
    ) -> tuple[Float[Array, ""], Scores]:  # fmt: skip
        """The weighted losses of text and teacher, added up over all slots, and what is known of each."""
        settings, batch, features = self.settings, example.batch, example.features
        assert features is not None, "an example has the features that `needs` names"
        assert features.last_BTE is not None, "an example has the features that `needs` names"
        states_BRD = self.states(draft, batch, text, anchor_BA)
        label_BAS, asked_BAS = self.asked(batch, anchor_BA)
        flat, apart = lambda x: x.reshape(states_BRD.shape[:2]), lambda x: x.reshape(label_BAS.shape)
        rows_BR = flat(anchor_BA[:, :, None] + jnp.arange(settings.block_size)[None, None])  # the tokens before
        before_BRE = draft.markov.embed(take_rows(batch.tokens_BT, rows_BR))
        latents_BRE = draft.markov.latents(before_BRE, states_BRD, settings.block_size)
        wide = jnp.promote_types(states_BRD.dtype, jnp.float32)
        weight_BAS = decayed(settings.decay_gamma, self.layout, asked_BAS.astype(wide))
        # The target's state at a token predicts the next one.
        last_BRE = take_rows(features.last_BTE, rows_BR).astype(states_BRD.dtype)
        total, known = corrected(
            text_and_teacher, self.how(draft, anchor_BA), Inputs(states_BRD, latents_BRE),
            Heads(head_VD, draft.markov.head_VE()), Asked(flat(label_BAS), flat(weight_BAS), last_BRE),
            flat(asked_BAS), Shares(*(jnp.asarray(x, wide) for x in (settings.ce_alpha, settings.l1_alpha))),
        )  # fmt: skip
        loss_BAS, hit_BAS, distance_BAS, teacher_hit_BAS = map(apart, known)
        logit_BAS = None if draft.confidence is None else apart(draft.confidence(states_BRD, before_BRE))
        return total, Scores(asked_BAS, weight_BAS, loss_BAS, hit_BAS, distance_BAS, teacher_hit_BAS, logit_BAS)

    def scored(
        self, draft: DSparkDraft, head_VD: Float[Array, "V D"], example: Example, text: list[Keys],
        anchor_BA: Int[Array, "B A"],
    ) -> Scores:  # fmt: skip
        return self._scored(draft, head_VD, example, text, anchor_BA)[1]

    def accepts(self, scores: Scores) -> Bool[Array, "B A S"]:
        if not self.settings.confidence_threshold:
            return scores.hit_BAS
        return scores.hit_BAS & trusted(scores.confidence_BAS, self.settings.confidence_threshold)

    def summed(self, scores: Scores) -> DSparkSums:
        """Losses by text and teacher have no gradient here; `sums` puts in the loss that has it."""
        settings, weight_BAS = self.settings, scores.weight_BAS
        blocks = block_sums(weight_BAS, self.counted, scores.asked_BAS, scores.loss_BAS, scores.hit_BAS)
        # The probability that sampled verification accepts a slot.
        accept_BAS = jnp.where(scores.asked_BAS, jnp.clip(1 - 0.5 * scores.distance_BAS, 0, 1), 0)
        text, distance = jnp.sum(weight_BAS * scores.loss_BAS), jnp.sum(weight_BAS * scores.distance_BAS)
        loss, own = settings.ce_alpha * text + settings.l1_alpha * distance, None
        if (logit_BAS := scores.confidence_BAS) is not None:
            teacher_BAS = jax.lax.stop_gradient(accept_BAS)
            of_logits = jnp.sum(weight_BAS * binary_cross_entropy(logit_BAS, teacher_BAS))
            error = jnp.sum(weight_BAS * jnp.abs(jax.nn.sigmoid(logit_BAS) - teacher_BAS))
            told = (x[:, :, self.counted] for x in (logit_BAS, scores.asked_BAS, scores.hit_BAS))
            own = ConfidenceSums(of_logits, error, None if self.num_tokens is None else surprise(*told))
            loss = loss + settings.confidence_alpha * of_logits
        count = lambda x: jnp.sum(x, dtype=jnp.int32)  # noqa: E731
        return DSparkSums(
            dataclasses.replace(blocks, loss=loss), text, distance, jnp.sum(jnp.cumprod(accept_BAS, axis=2)),
            count(scores.teacher_hit_BAS & scores.asked_BAS), own,
        )  # fmt: skip

    def sums(self, draft: DSparkDraft, example: Example, carry: Any) -> DSparkSums:
        text, anchor_BA = self.read(draft, example), example.chosen.anchor_BA
        total, scores = self._scored(draft, draft.head_VD(), example, text, anchor_BA)
        found = self.summed(scores)
        if found.confidence is not None:
            total = total + self.settings.confidence_alpha * found.confidence.loss
        return found.trained_by(total)

    def flops(self, params: nnx.State, frozen: nnx.State, example: Example) -> float:
        """The table of tokens is looked up; the head makes the teacher's logits as well."""
        products = [(path, x) for path, x in nnx.to_flat_state(params) if path != ("markov", "embed_tokens")]
        of_draft = super().flops(nnx.from_flat_state(products), frozen, example)
        num_predicted = example.chosen.anchor_BA.size * self.layout.num_predicted
        return of_draft + 2.0 * math.prod(frozen["head"].shape) * num_predicted

    def drafter(self) -> DSparkDrafter:
        return DSparkDrafter(self.layout, self.settings.confidence_threshold)

    def serving(self) -> Contract:
        """The contract of its exports."""
        from flaxdraft.algorithms.dspark.serving import contract  # tables and rules that training never reads

        return contract
