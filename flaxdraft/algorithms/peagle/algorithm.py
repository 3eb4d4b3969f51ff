"""P-EAGLE as an algorithm: what `interfaces.Algorithm` asks for.

Shape letters: B batch, T time, R elements of a depth, E target width, W draft vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from flaxdraft.algorithms.eagle3 import from_target
from flaxdraft.algorithms.eagle3.objective import UnrollOptions, attention_of, supervision
from flaxdraft.algorithms.peagle import depths, flops
from flaxdraft.algorithms.peagle.draft import ParallelDraft
from flaxdraft.algorithms.peagle.drafter import ParallelDrafter
from flaxdraft.algorithms.peagle.objective import scored, states
from flaxdraft.algorithms.peagle.settings import Settings
from flaxdraft.algorithms.peagle.sums import DepthSums
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Batch, Draw, EmbeddingAndHead, Example, VocabMap
from flaxdraft.ops.distillation import DistillOptions
from flaxdraft.serving.contract import Contract


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """Training computes some depths behind some places; evaluation all of them behind every place."""

    settings: Settings
    packed: bool = True  # whether rows may hold several documents; False is a little faster with cuDNN
    # In evaluation, the tokens that a pass proposes; None in training.
    num_tokens: int | None = None

    full_vocabulary = False
    needs = ("taps_BTKE", "last_BTE", "argmax_BT", "logsumexp_BT")

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
            InputError: no answer is long enough for every depth.
        """
        if self.settings.num_depths > longest - 1:
            raise InputError(
                f"algorithm.num_depths: found {self.settings.num_depths}, but the longest answer has {longest} tokens, "
                f"so that the last depth would never be trained; expected at most {longest - 1}"
            )

    def choose(self, batch: Batch, most_supervised: int, draw: Draw) -> depths.Depths:
        if self.num_tokens is not None:
            return depths.every(batch, most_supervised, self.num_tokens)
        return depths.sampled(batch, most_supervised, draw, self.settings)

    def share(self, example: Example, num_shards: int) -> tuple[Example, Example]:
        """
        Raises:
            InputError: always.
        """
        raise InputError(
            f"mesh.sequence: found {num_shards}, but peagle does not share the rows of a batch row; leave it at 1 and "
            "take mesh.data, mesh.fsdp or mesh.tensor"
        )

    def first_carry(self) -> tuple[()]:
        """Nothing depends on the steps before."""
        return ()

    def next_carry(self, carry: tuple[()], sums: DepthSums, step: Int[Array, ""]) -> tuple[()]:
        return carry

    def _scored(self, draft: ParallelDraft, example: Example) -> tuple[DepthSums, list[Bool[Array, "B R"]]]:
        batch, features, head_WE = example.batch, example.features, example.teacher
        assert features is not None, "an example has the features that `needs` names"
        hidden_BMD = states(draft, batch, features.taps_BTKE.astype(head_WE.dtype), example.chosen, self.options)
        trainable_BT = supervision(batch.assistant_BT, batch.segments_BT, 1)[0]
        options = DistillOptions((1.0,), self.settings.objective, self.settings.loss_chunk)
        return scored(options, draft, hidden_BMD, example.chosen, trainable_BT, features, head_WE)

    def sums(self, draft: ParallelDraft, example: Example, carry: tuple[()]) -> DepthSums:
        return self._scored(draft, example)[0]

    def accepted(self, draft: ParallelDraft, example: Example) -> tuple[DepthSums, Int[Array, "B T"]]:
        """The sums, and for each row of the batch how many draft tokens greedy verification would accept there.
        Exact on the target's own greedy answers, since masked places do not read what comes after the newest token."""
        sums, right = self._scored(draft, example)
        count_BT = jnp.zeros_like(example.batch.tokens_BT)
        add = jax.vmap(lambda row, at, more: row.at[at].add(more, mode="drop"))
        for at_BR, right_BR in zip(example.chosen.anchors, right, strict=True):
            count_BT = add(count_BT, at_BR, right_BR.astype(count_BT.dtype))
        return sums, count_BT

    def describe(self, draft: ParallelDraft, example: Example) -> str:
        """How sums of such an example are computed on this machine, for the log.

        Raises:
            InputError: in a way that cannot run here; see `attention_of`.
        """
        s, length = self.settings, example.batch.tokens_BT.shape[1]
        attention = attention_of(draft, example, length, self.options)
        sizes = " + ".join(str(at_BR.shape[1]) for at_BR in example.chosen.anchors[1:]) or "none"
        return (
            f"{length} places of a row and, masked, at most {sizes}, attention {attention}, "
            f"loss in chunks of {s.loss_chunk} places, rematerialisation {s.remat}"
        )

    def flops(self, params: nnx.State, frozen: nnx.State, example: Example) -> float:
        return flops.of_step(params, example)

    def warm_start(self, draft: ParallelDraft, target: EmbeddingAndHead, vocab: VocabMap) -> None:
        """See `from_target.warm_start`."""
        from_target.warm_start(draft, target, vocab)

    def drafting(self, num_tokens: int) -> Algorithm:
        """`num_tokens` behind every place, rows of one document."""
        return Algorithm(self.settings, packed=False, num_tokens=num_tokens)

    def drafter(self) -> ParallelDrafter:
        return ParallelDrafter()

    def serving(self) -> Contract:
        """The contract of its exports."""
        from flaxdraft.algorithms.peagle.serving import contract  # tables and rules that training never reads

        return contract
