"""The algorithm: see `interfaces.Algorithm`.

Shape letters: B batch, T time, A anchors, Q proposals of a block, K tapped layers, E width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from blocky import anchors
from blocky.draft import BlockDraft, Text
from blocky.drafter import BlockDrafter
from blocky.settings import Settings
from blocky.sums import BlockSums
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Batch, Draw, EmbeddingAndHead, Example, VocabMap
from flaxdraft.ops.rows import take_rows

NUM_TAPS = 5


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """Blocks behind drawn anchors; in evaluation behind every one."""

    settings: Settings
    packed: bool = True
    num_tokens: int | None = None  # proposed a pass in evaluation; None: training, of all

    full_vocabulary = True
    needs = ("taps_BTKE",)

    def tap_layers(self, num_layers: int, chosen: tuple[int, ...] | None) -> tuple[int, ...]:
        taps = chosen or tuple(np.linspace(1, num_layers - 2, NUM_TAPS).round().astype(int).tolist())
        if len(set(taps)) != NUM_TAPS or [*taps] != sorted(taps) or not 0 <= taps[0] <= taps[-1] < num_layers:
            raise InputError(f"target.tap_layers: {[*taps]} are not {NUM_TAPS} ascending layers of {num_layers}")
        return taps

    def teacher(self, target: EmbeddingAndHead, vocab: VocabMap, dtype: Any) -> tuple[()]:
        """The loss asks for the tokens themselves; embedding and head are the draft's own."""
        return ()

    def check_answers(self, longest: int) -> None:
        size = self.settings.block_size
        if size > longest:
            raise InputError(
                f"algorithm.block_size: found {size}, but the longest answer has {longest} tokens, so that the last "
                f"proposals would never be right; expected at most {longest}"
            )

    def choose(self, batch: Batch, most_supervised: int, draw: Draw) -> anchors.Anchors:
        if self.num_tokens is not None:
            return anchors.every(batch, most_supervised)
        return anchors.drawn(batch, self.settings.num_anchors, draw)

    def share(self, example: Example, num_shards: int) -> tuple[Example, Example]:
        raise InputError(f"mesh.sequence: found {num_shards}, but blocky does not share rows; expected 1")

    def first_carry(self) -> Int[Array, ""]:
        """Steps done."""
        return jnp.zeros((), jnp.int32)

    def next_carry(self, carry: Int[Array, ""], sums: BlockSums, step: Int[Array, ""]) -> Int[Array, ""]:
        return carry + 1

    def _blocks(self, draft: BlockDraft, example: Example):
        """Cross entropies, hits, and which proposals have a right answer, [B, A, Q] each."""
        batch, rows_BA = example.batch, example.chosen.rows_BA
        num_tokens = self.num_tokens or self.settings.block_size - 1
        at = lambda x, ahead: take_rows(x, rows_BA + ahead)  # noqa: E731
        segments_BA = at(batch.segments_BT, 0)
        visible_BAS = (segments_BA[..., None] == batch.segments_BT[:, None]) & (segments_BA[..., None] > 0)
        visible_BAS = visible_BAS & (jnp.arange(batch.tokens_BT.shape[1])[None, None] <= rows_BA[..., None])
        text = Text(draft.context(example.features.taps_BTKE), batch.positions_BT)
        logits = draft.logits(at(batch.tokens_BT, 1), at(batch.positions_BT, 0) + 1, text, visible_BAS)
        logits, steps = logits[:, :, :num_tokens], range(num_tokens)
        right_BAQ = jnp.stack([at(batch.tokens_BT, 2 + i) for i in steps], axis=2)
        own = lambda i: at(batch.assistant_BT, i) & (at(batch.segments_BT, i) == segments_BA)  # noqa: E731
        asked_BAQ = jnp.cumprod(jnp.stack([own(1) & own(2 + i) for i in steps], axis=2), axis=2).astype(bool)
        is_right = right_BAQ[..., None] == jnp.arange(logits.shape[-1])[None, None, None]
        entropy_BAQ = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(is_right, logits, 0.0), axis=-1)
        hit_BAQ = (jnp.argmax(logits, axis=-1) == right_BAQ) & asked_BAQ
        return entropy_BAQ, hit_BAQ, asked_BAQ

    def _sums(self, blocks, carry: Int[Array, ""]) -> BlockSums:
        entropy_BAQ, hit_BAQ, asked_BAQ = blocks
        gamma = self.settings.gamma * jnp.minimum(1.0, (carry + 1) / self.settings.gamma_steps)
        weight_BAQ = jnp.exp(-jnp.arange(hit_BAQ.shape[2]) / gamma)[None, None] * asked_BAQ
        prefix_BAQ = jnp.cumprod(hit_BAQ, axis=2, dtype=jnp.int32)
        count = lambda x: jnp.sum(x, axis=(0, 1), dtype=jnp.int32)  # noqa: E731
        return BlockSums(
            jnp.sum(weight_BAQ * entropy_BAQ), jnp.sum(weight_BAQ), count(asked_BAQ), count(hit_BAQ), count(prefix_BAQ)
        )

    def sums(self, draft: BlockDraft, example: Example, carry: Int[Array, ""]) -> BlockSums:
        return self._sums(self._blocks(draft, example), carry)

    def accepted(self, draft: BlockDraft, example: Example) -> tuple[BlockSums, Int[Array, "B T"]]:
        """Exact on the target's own greedy answers: a block does not depend on what comes after its newest token."""
        blocks = self._blocks(draft, example)
        count_BA = jnp.sum(jnp.cumprod(blocks[1], axis=2, dtype=jnp.int32), axis=2, dtype=jnp.int32)
        scatter = jax.vmap(lambda row, at, value: row.at[at].set(value, mode="drop"))
        empty_BT = jnp.zeros_like(example.batch.tokens_BT)
        return self._sums(blocks, jnp.int32(self.settings.gamma_steps)), scatter(
            empty_BT, example.chosen.rows_BA, count_BA
        )

    def describe(self, draft: BlockDraft, example: Example) -> str:
        return f"{example.chosen.rows_BA.shape[1]} blocks of {self.settings.block_size} a row"

    def flops(self, params: nnx.State, frozen: nnx.State, example: Example) -> float:
        """`fc` reads a row once, the layers every position of a block, the head every proposal; that one, being
        frozen, has one gradient product, not two."""
        blocks, size = example.chosen.rows_BA.size, self.settings.block_size
        total = 4.0 * math.prod(frozen["head"].shape) * blocks * (size - 1)
        for path, variable in nnx.to_flat_state(params):
            if len(variable.shape) > 1:
                rows = example.batch.tokens_BT.size if path[0] == "fc" else blocks * size
                total += 6.0 * math.prod(variable.shape) * rows
        return total

    def warm_start(self, draft: BlockDraft, target: EmbeddingAndHead, vocab: VocabMap) -> None:
        """The norm that stands before the target's head."""
        draft.norm.scale[...] = target.final_norm().astype(draft.norm.scale.dtype)

    def drafting(self, num_tokens: int) -> Algorithm:
        return Algorithm(self.settings, packed=False, num_tokens=num_tokens)

    def drafter(self) -> BlockDrafter:
        return BlockDrafter(self.settings.block_size)

    def serving(self) -> ModuleType:
        from blocky import serving

        return serving
