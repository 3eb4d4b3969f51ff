"""DFlash as an algorithm: what `interfaces.Algorithm` asks for.

Shape letters: B batch, T time, A blocks, R = A S rows of blocks of S slots, Q slots that predict, D draft
width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from flaxdraft.algorithms.dflash import anchors, flops
from flaxdraft.algorithms.dflash.block_attention import Keys, Way, choose
from flaxdraft.algorithms.dflash.draft import BlockDraft, Places
from flaxdraft.algorithms.dflash.drafter import BlockDrafter
from flaxdraft.algorithms.dflash.layout import Layout, Wanted, layout_of, wanted
from flaxdraft.algorithms.dflash.objective import summed
from flaxdraft.algorithms.dflash.taps import default_taps
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Batch, Draw, EmbeddingAndHead, Example, VocabMap
from flaxdraft.ops.attention import document_ranges
from flaxdraft.ops.cross_entropy import How, cross_entropy
from flaxdraft.ops.padding import even_part
from flaxdraft.ops.range_attention import Chunks
from flaxdraft.ops.rows import take_rows
from flaxdraft.serving.contract import Contract

SLOTS_AT_ONCE = 2**15  # of all batch rows, in evaluation


class Scores(NamedTuple):
    """What is known of every slot of some blocks."""

    asked_BAS: Bool[Array, "B A S"]  # whether there is a right token
    known_BAS: Bool[Array, "B A S"]  # and the draft knows it
    loss_BAS: Float[Array, "B A S"]  # cross entropy
    hit_BAS: Bool[Array, "B A S"]  # the right token has the highest logit


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """Training computes a block behind each of a few drawn anchors; evaluation one behind every possible anchor.

    Algorithms build on this one, with a head that goes along the block. What they have of their own is typed as
    anything here: the draft, what is carried, what is known of slots, the sums.
    """

    settings: Any  # `Settings`; of an algorithm that builds on this one, its own `BlockSettings`
    packed: bool = True  # whether rows hold several documents; nothing here is faster without
    # In evaluation, the tokens that a pass proposes; None in training, where every slot that predicts counts.
    num_tokens: int | None = None

    full_vocabulary = True
    needs = ("taps_BTKE",)

    @property
    def layout(self) -> Layout:
        return layout_of(self.settings.block_size, self.settings.sample_from_anchor)

    @property
    def way(self) -> Way:
        """How the attention is computed."""
        return Way(self.settings.attention, Chunks(self.settings.attention_chunk, self.settings.attention_chunk))

    def tap_layers(self, num_layers: int, chosen: tuple[int, ...] | None) -> tuple[int, ...]:
        """The layers that the user chose, or the default ones.

        Raises:
            InputError: they are not ascending layers of the model.
        """
        taps = default_taps(num_layers) if chosen is None else chosen
        if not taps or [*taps] != sorted(set(taps)) or not 0 <= taps[0] <= taps[-1] < num_layers:
            raise InputError(
                f"target.tap_layers: {[*taps]} are not ascending layers of a {num_layers}-layer target; give some of "
                f"0..{num_layers - 1}, for instance {[*default_taps(max(num_layers, 4))]}"
            )
        return taps

    def teacher(self, target: EmbeddingAndHead, vocab: VocabMap, dtype: Any) -> tuple[()]:
        """Nothing: the loss asks for the tokens themselves, and the draft holds embedding and head."""
        return ()

    def check_answers(self, longest: int) -> None:
        """
        Raises:
            InputError: no answer is long enough for every slot of a block.
        """
        if self.layout.num_predicted > longest - 1:
            raise InputError(
                f"algorithm.block_size: found {self.settings.block_size}, but the longest answer has {longest} tokens, "
                f"so that the last slot would never be trained; expected at most {longest - 1 + self.layout.first}"
            )

    def choose(self, batch: Batch, most_supervised: int, draw: Draw) -> anchors.Anchors:
        if self.num_tokens is not None:
            return anchors.every(batch, most_supervised)
        return anchors.drawn(batch, min(self.settings.num_anchors, most_supervised), draw)

    def share(self, example: Example, num_shards: int) -> tuple[Example, Example]:
        """
        Raises:
            InputError: always.
        """
        raise InputError(
            f"mesh.sequence: found {num_shards}, but {self.settings.name} does not share the rows of a batch row; "
            "leave it at 1 and take mesh.data, mesh.fsdp or mesh.tensor"
        )

    def first_carry(self) -> Any:
        """Nothing: no step depends on the steps before it."""
        return ()

    def next_carry(self, carry: Any, sums: Any, step: Int[Array, ""]) -> Any:
        return carry

    def read(self, draft: BlockDraft, example: Example) -> list[Keys]:
        """Each layer's keys and values of the text."""
        assert example.features is not None, "an example has the features that `needs` names"
        return draft.read(example.features.taps_BTKE, example.batch.positions_BT)

    def states(
        self, draft: BlockDraft, batch: Batch, text: list[Keys], anchor_BA: Int[Array, "B A"]
    ) -> Float[Array, "B R D"]:
        """The head's input at every slot of some blocks."""
        num_rows = batch.tokens_BT.shape[1]
        first_BA = take_rows(document_ranges(batch.segments_BT).first_BR, anchor_BA)
        # The document of a padding anchor is said to begin past the last row, so that its slots see no text.
        first_BA = jnp.where(anchor_BA < num_rows, first_BA, num_rows)
        places = Places(anchor_BA, first_BA, take_rows(batch.positions_BT, anchor_BA))
        return draft(take_rows(batch.tokens_BT, anchor_BA), text, places, self.way, self.settings.remat)

    def asked(self, batch: Batch, anchor_BA: Int[Array, "B A"]) -> Wanted:
        """What is asked of each slot that predicts or, in evaluation, that proposes."""
        stop_at_hole = self.stops_at_hole or self.num_tokens is not None
        found = wanted(batch, anchor_BA, self.layout, stop_at_hole=stop_at_hole)
        counted_S = jnp.arange(self.layout.block_size) < self.counted.stop
        return found._replace(asked_BAS=found.asked_BAS & counted_S[None, None])

    def _loss_chunk(self, anchor_BA: Any) -> int:
        """The slots whose logits exist at a time. All chunks are equally large, so that the last one multiplies little
        for nothing."""
        return even_part(anchor_BA.size * (self.counted.stop - self.counted.start), self.settings.loss_chunk)

    def how(self, draft: Any, anchor_BA: Int[Array, "B A"]) -> How:
        """How the logits of some blocks are computed."""
        return How(self._loss_chunk(anchor_BA), draft.made_of)

    @property
    def stops_at_hole(self) -> bool:
        """Whether training asks nothing behind a token that is not the assistant's."""
        return self.settings.stop_at_hole

    @property
    def counted(self) -> slice:
        """The slots of a block whose tokens are proposed."""
        first = self.layout.first
        return slice(first, first + (self.num_tokens or self.layout.num_predicted))

    def scored(
        self, draft: Any, head_VD: Float[Array, "V D"], example: Example, text: list[Keys], anchor_BA: Int[Array, "B A"]
    ) -> Any:
        """What is known of every slot of some blocks, as arrays [B, A, S] with `hit_BAS` among them."""
        states_BRD = self.states(draft, example.batch, text, anchor_BA)
        label_BAS, asked_BAS = self.asked(example.batch, anchor_BA)
        label_BAS = draft.known(label_BAS)
        known_BAS = asked_BAS & (label_BAS >= 0)
        flat = lambda x: x.reshape(states_BRD.shape[:2])  # noqa: E731
        loss_BR, hit_BR = cross_entropy(
            self.how(draft, anchor_BA), states_BRD, head_VD, flat(label_BAS), flat(known_BAS)
        )
        return Scores(asked_BAS, known_BAS, loss_BR.reshape(asked_BAS.shape), hit_BR.reshape(asked_BAS.shape))

    def summed(self, scores: Any) -> Any:
        """The sums of what `scored` gave. A token that the draft does not know is no part of the loss, and missed."""
        found = summed(self.settings, self.layout, self.counted, scores.known_BAS, scores.loss_BAS, scores.hit_BAS)
        return found.asking(scores.asked_BAS[:, :, self.counted])

    def accepts(self, scores: Any) -> Bool[Array, "B A S"]:
        """The slots whose tokens verification takes, if it takes those before."""
        return scores.hit_BAS

    def sums(self, draft: Any, example: Example, carry: Any) -> Any:
        text, anchor_BA = self.read(draft, example), example.chosen.anchor_BA
        return self.summed(self.scored(draft, draft.head_VD(), example, text, anchor_BA))

    def accepted(self, draft: Any, example: Example) -> tuple[Any, Int[Array, "B T"]]:
        """The sums, and for each row of the batch how many draft tokens greedy verification would accept there: those
        of the block whose newest token is in the row after it. Exact on the target's own greedy answers, since a block
        does not depend on what comes after its newest token.

        Blocks stand behind every token here, so they are gone through some at a time.
        """
        batch, text, anchor_BA = example.batch, self.read(draft, example), example.chosen.anchor_BA
        (num_batch, num_blocks), length, head_VD = anchor_BA.shape, batch.tokens_BT.shape[1], draft.head_VD()
        size = max(SLOTS_AT_ONCE // (num_batch * self.layout.block_size), 1)
        padded_BA = jnp.pad(anchor_BA, ((0, 0), (0, -num_blocks % size)), constant_values=length)
        part_GBA = jnp.moveaxis(padded_BA.reshape(num_batch, -1, size), 1, 0)
        parts = jax.lax.map(lambda part_BA: self.scored(draft, head_VD, example, text, part_BA), part_GBA)
        joined = lambda x: jnp.moveaxis(x, 0, 1).reshape(*padded_BA.shape, self.layout.block_size)  # noqa: E731
        scores = jax.tree.map(joined, parts)
        right_BAQ = jnp.cumprod(self.accepts(scores)[:, :, self.counted], axis=2, dtype=jnp.int32)
        count_BA = jnp.sum(right_BAQ, axis=2, dtype=jnp.int32)
        scatter = jax.vmap(lambda row, at, value: row.at[at].set(value, mode="drop"))
        # The pass of a block with its anchor in row p is counted in row p - 1. No pass begins with an anchor in row 0.
        before_BA = jnp.where(padded_BA > 0, padded_BA - 1, length)
        return self.summed(scores), scatter(jnp.zeros_like(batch.tokens_BT), before_BA, count_BA)

    def describe(self, draft: BlockDraft, example: Example) -> str:
        """For the log: how the sums of such an example are computed."""
        s, (num_batch, num_blocks) = self.settings, example.chosen.anchor_BA.shape
        num_queries, num_keys = num_batch * num_blocks * s.block_size, example.batch.tokens_BT.shape[1]
        attention = choose(s.attention, num_queries, draft.config.num_attention_heads, num_keys)
        chunks = f" ({s.attention_chunk} x {s.attention_chunk})" if attention == "chunked" else ""
        return (
            f"{num_blocks} blocks of {s.block_size} a row, attention {attention}{chunks}, loss in chunks of at most "
            f"{self._loss_chunk(example.chosen.anchor_BA)} slots, rematerialisation {s.remat}"
        )

    def flops(self, params: nnx.State, frozen: nnx.State, example: Example) -> float:
        return flops.of_step(params, frozen, example, self.layout)

    def warm_start(self, draft: BlockDraft, target: EmbeddingAndHead, vocab: VocabMap) -> None:
        """The draft's last norm begins as the one that stands before the target's head."""
        draft.norm.scale[...] = target.final_norm().astype(draft.norm.scale.dtype)

    def drafting(self, num_tokens: int) -> Algorithm:
        """For evaluation: a pass proposes `num_tokens`, and rows hold one document each."""
        return dataclasses.replace(self, packed=False, num_tokens=num_tokens)

    def drafter(self) -> BlockDrafter:
        return BlockDrafter(self.layout)

    def serving(self) -> Contract:
        """The contract of this algorithm's exports."""
        from flaxdraft.algorithms.dflash.serving import contract  # tables and rules that training never reads

        return contract
