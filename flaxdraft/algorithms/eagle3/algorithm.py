"""EAGLE-3 as an algorithm: what `interfaces.Algorithm` asks for.

Shape letters: B batch, T time, R computed rows, J steps of the unroll, K tapped layers, E target width, W draft
vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from flaxdraft.algorithms.eagle3 import flops, from_target, shared_rows
from flaxdraft.algorithms.eagle3.drafter import ChainDrafter
from flaxdraft.algorithms.eagle3.objective import (
    ChosenRows,
    UnrollOptions,
    attention_of,
    supervised_rows,
    supervision,
    unroll,
)
from flaxdraft.algorithms.eagle3.settings import Settings
from flaxdraft.algorithms.eagle3.surface import Draft
from flaxdraft.devices.sharding import spec_of
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Batch, Draw, EmbeddingAndHead, Example, VocabMap
from flaxdraft.ops import distillation
from flaxdraft.ops.rows import take_rows
from flaxdraft.ops.step_sums import StepSums
from flaxdraft.serving.contract import Contract

_NEEDED = "an example has the features that `needs` names"


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """EAGLE-3 with the steps, weights and objective of its settings.

    packed: whether a row may hold several documents; False is a little faster with cuDNN.
    """

    settings: Settings
    packed: bool = True

    full_vocabulary = False
    needs = ("taps_BTKE", "last_BTE", "argmax_BT", "logsumexp_BT")

    @property
    def step_weights(self) -> tuple[float, ...]:
        return tuple(self.settings.step_decay**j for j in range(self.settings.ttt_length))

    @property
    def options(self) -> UnrollOptions:
        s = self.settings
        return UnrollOptions(s.attention, s.remat, s.attention_chunk, self.packed)

    def tap_layers(self, num_layers: int, chosen: tuple[int, ...] | None) -> tuple[int, ...]:
        """See `from_target.three_taps`."""
        return from_target.three_taps(num_layers, chosen)

    def teacher(self, target: EmbeddingAndHead, vocab: VocabMap, dtype: Any) -> Float[Array, "W E"]:
        """See `from_target.head_rows`."""
        return from_target.head_rows(target, vocab, dtype)

    def check_answers(self, longest: int) -> None:
        """
        Raises:
            InputError: no answer is long enough for every step of the unroll.
        """
        if self.settings.ttt_length > longest - 1:
            raise InputError(
                f"algorithm.ttt_length: found {self.settings.ttt_length}, but the longest answer has {longest} tokens, "
                f"so that step {self.settings.ttt_length} would supervise nothing; expected at most {longest - 1}"
            )

    def choose(self, batch: Batch, most_supervised: int, draw: Draw) -> ChosenRows:
        """The rows that some step supervises; nothing is drawn."""
        segments_BT, (num_batch, length) = np.asarray(batch.segments_BT), batch.tokens_BT.shape
        assert self.packed or np.max(segments_BT, initial=0) <= 1, "several documents in a row, without `packed`"
        rows_BR = np.full((num_batch, most_supervised), length, np.int32)
        kept = supervised_rows(batch.assistant_BT, segments_BT)
        rows_BR[:, : kept.shape[1]] = kept
        return ChosenRows(rows_BR)

    def share(self, example: Example, num_shards: int) -> tuple[Example, Example]:
        """See `interfaces.Algorithm` and shared_rows.py."""
        return shared_rows.share(example, num_shards, self.settings.ttt_length)

    def first_carry(self) -> Float[Array, " J"]:
        """The mean expected acceptance of each step over the global batch before, which lk_lambda reads."""
        return jnp.zeros(self.settings.ttt_length)

    def next_carry(self, carry: Float[Array, " J"], sums: StepSums, step: Int[Array, ""]) -> Float[Array, " J"]:
        mean_J = sums.expected_accept_J / jnp.maximum(sums.row_count_J, 1)
        return jnp.where(sums.row_count_J > 0, mean_J, carry)

    def _distill(self, draft: Draft, example: Example, accepted_J) -> tuple[StepSums, Bool[Array, "B R J"]]:
        batch, chosen, features = example.batch, example.chosen, example.features
        assert features is not None, _NEEDED
        rows, compute, num_steps = chosen.rows_BR, example.teacher.dtype, self.settings.ttt_length
        if chosen.shared is not None:
            narrow = dataclasses.replace(chosen.shared, taps_BRKE=chosen.shared.taps_BRKE.astype(compute))
            chosen = dataclasses.replace(chosen, shared=narrow)
        outputs = unroll(draft, batch, features.taps_BTKE.astype(compute), chosen, num_steps, self.options)
        # The teacher of row p at step 0 is the target's distribution at p + 1.
        if chosen.shared is None:
            assert features.last_BTE is not None, _NEEDED
            last_BRE = take_rows(features.last_BTE, rows + 1)
        else:
            last_BRE = chosen.shared.last_BRE
        assert features.argmax_BT is not None, _NEEDED
        assert features.logsumexp_BT is not None, _NEEDED
        argmax_BR, logsumexp_BR = (take_rows(x, rows + 1) for x in (features.argmax_BT, features.logsumexp_BT))
        act_b, draft_ids_V = draft.sharding.act_b, draft.draft_ids[...]
        argmax_BR = draft_ids_V.at[argmax_BR].get(out_sharding=act_b and spec_of(argmax_BR))
        teacher = distillation.TeacherStates(last_BRE.astype(compute), logsumexp_BR, argmax_BR)
        supervised_JBT = supervision(batch.assistant_BT, batch.segments_BT, num_steps)
        supervised_JBR = jnp.stack([take_rows(mask_BT, rows) for mask_BT in supervised_JBT])
        if chosen.shared is not None:
            supervised_JBR = supervised_JBR & chosen.shared.owned_BR[None]
        return distillation.distill(
            distillation.DistillOptions(self.step_weights, self.settings.objective, self.settings.loss_chunk),
            tuple(draft.head_input(hidden) for hidden in outputs), draft.head(), teacher, example.teacher,
            supervised_JBR, accepted_J,
        )  # fmt: skip

    def sums(self, draft: Draft, example: Example, carry: Float[Array, " J"]) -> StepSums:
        """All that a trainer calls."""
        return self._distill(draft, example, carry)[0]

    def accepted(self, draft: Draft, example: Example) -> tuple[StepSums, Int[Array, "B T"]]:
        """The sums, and for each row of the batch how many draft tokens greedy verification would accept there.

        Exact where the row's tokens are the target's own greedy answer: then teacher forcing feeds the draft what
        it would have proposed, up to its first miss. The batch must be whole along time.
        """
        sums, hit_BRJ = self._distill(draft, example, self.first_carry())
        count_BR = jnp.sum(jnp.cumprod(hit_BRJ, axis=-1, dtype=jnp.int32), axis=-1, dtype=jnp.int32)
        empty_BT = jnp.zeros_like(example.batch.tokens_BT)
        scatter = jax.vmap(lambda row, at, value: row.at[at].set(value, mode="drop"))
        return sums, scatter(empty_BT, example.chosen.rows_BR, count_BR)

    def describe(self, draft: Draft, example: Example) -> str:
        """How sums of such an example are computed on this machine, for the log.

        Raises:
            InputError: in a way that cannot run here; see `objective.attention_of`.
        """
        s, attention = self.settings, attention_of(draft, example, example.chosen.rows_BR.shape[1], self.options)
        return f"attention {attention}, loss in chunks of {s.loss_chunk} rows, rematerialisation {s.remat}"

    def flops(self, params: nnx.State, frozen: nnx.State, example: Example) -> float:
        return flops.of_step(params, example, self.settings.ttt_length)

    def warm_start(self, draft: Any, target: EmbeddingAndHead, vocab: VocabMap) -> None:
        """See `from_target.warm_start`."""
        from_target.warm_start(draft, target, vocab)

    def drafting(self, num_tokens: int) -> Algorithm:
        """Chains of `num_tokens`, rows of one document."""
        return Algorithm(self.settings.model_copy(update={"ttt_length": num_tokens}), packed=False)

    def drafter(self) -> ChainDrafter:
        return ChainDrafter()

    def serving(self) -> Contract:
        """The contract of its exports."""
        from flaxdraft.algorithms.eagle3.serving import contract  # tables and rules that training never reads

        return contract
