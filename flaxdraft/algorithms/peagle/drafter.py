"""How the draft proposes, as vLLM runs it: one pass over masked places. See `interfaces.Drafter`.

Row p holds (tapped states at p, token x_{p+1}); its cache slot is p. The last real row, which is the one before the
newest token and has read it, gives the first proposal. The masked places behind it give the others: they write keys of
their own behind the text, which the rows of accepted tokens overwrite before anybody reads them.

Shape letters: B rows, T new positions, S slots, K tapped layers or key/value heads, H key width, C value width,
D draft width, E target width, Q proposals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flaxdraft.algorithms.eagle3.drafter import DraftCache
from flaxdraft.algorithms.peagle.draft import ParallelDraft
from flaxdraft.interfaces import Chooser, Proposal
from flaxdraft.nn.rope import turning_positions
from flaxdraft.nn.self_attention import Heads
from flaxdraft.ops.attention import attend_cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ParallelState:
    """Between two proposals."""

    caches: list[DraftCache]  # of each layer
    hidden_BD: Float[Array, "B D"]  # of the last real row, which gives the first proposal


def written(
    heads: Heads, cache: DraftCache, projected: Any, positions_BT: Int[Array, "B T"]
) -> tuple[DraftCache, Float[Array, "B T N C"]]:
    """A layer's cache with new rows, and what they attend to: all that lies up to their own positions."""
    num_slots, rows_B1 = cache.k_BKHS.shape[-1], jnp.arange(len(positions_BT))[:, None]
    turning_BT = turning_positions(positions_BT, num_slots)
    k, v = heads.key_value(projected, turning_BT)
    cache = DraftCache(
        cache.k_BKHS.at[rows_B1, :, :, positions_BT].set(k, mode="drop"),
        cache.v_BKSC.at[rows_B1, :, positions_BT].set(v, mode="drop"),
    )
    visible_BTS = jnp.arange(num_slots)[None, None] <= positions_BT[:, :, None]
    q = heads.query(projected, turning_BT)
    return cache, attend_cache(q, cache.k_BKHS, cache.v_BKSC, visible_BTS, heads.softmax_scale)


def through(
    draft: ParallelDraft, caches: list[DraftCache], hidden_BTD: Float[Array, "B T D"], projected: Any,
    positions_BT: Int[Array, "B T"],
) -> tuple[list[DraftCache], Float[Array, "B T D"]]:  # fmt: skip
    """All layers on new rows; positions beyond the last slot mark padding.

    Args:
        hidden_BTD: what the first layer's residual begins with.
        projected: what its projections make of the rows.
    """
    first, heads = written(draft.self_attn, caches[0], projected, positions_BT)
    hidden_BTD, found = draft.finish(hidden_BTD, heads), [first]
    for layer, cache in zip(draft.further, caches[1:], strict=True):
        cache, heads = written(layer.self_attn, cache, layer.project(hidden_BTD), positions_BT)
        hidden_BTD = layer.finish(hidden_BTD, heads)
        found.append(cache)
    return found, hidden_BTD


@dataclasses.dataclass(frozen=True)
class ParallelDrafter:
    """All proposals at once, however many."""

    most_tokens = None
    trees = False

    def start(self, draft: ParallelDraft, num_rows: int, num_slots: int) -> ParallelState:
        """Empty; the shapes come from the draft's own projections."""
        shape, compute = (num_rows, num_slots, draft.config.hidden_size), draft.precision.compute
        hidden, positions = jax.ShapeDtypeStruct(shape, compute), jax.ShapeDtypeStruct(shape[:2], jnp.int32)

        def empty(keys: Callable) -> DraftCache:
            k, v = jax.eval_shape(keys, hidden, positions)
            (B, S, K, H), C = k.shape, v.shape[-1]
            return DraftCache(jnp.zeros((B, K, H, S), k.dtype), jnp.zeros((B, K, S, C), v.dtype))

        def first(x, at):
            return draft.key_value(draft.projections(draft.token_projections(x), x), at)

        further = [
            lambda x, at, layer=layer: layer.self_attn.key_value(layer.project(x), at) for layer in draft.further
        ]
        return ParallelState([empty(keys) for keys in (first, *further)], jnp.zeros((num_rows, shape[2]), compute))

    def read(
        self, draft: ParallelDraft, state: ParallelState, taps_BTKE: Float[Array, "B T K E"],
        next_BT: Int[Array, "B T"], positions_BT: Int[Array, "B T"], last_B: Int[Array, " B"],
    ) -> ParallelState:  # fmt: skip
        """Rows with real target states: row p takes the taps of p and token x_{p+1}."""
        hidden = draft.project(taps_BTKE.astype(draft.precision.compute))
        projected = draft.projections(draft.token_projections(draft.embed(next_BT)), hidden)
        caches, hidden = through(draft, state.caches, hidden, projected, positions_BT)
        return ParallelState(caches, hidden[jnp.arange(len(hidden)), last_B])

    def propose(
        self, draft: ParallelDraft, state: ParallelState, newest_B: Int[Array, " B"], token_B: Int[Array, " B"],
        num_tokens: int, choose: Chooser,
    ) -> tuple[ParallelState, Proposal]:  # fmt: skip
        caches, hidden_BQD = state.caches, state.hidden_BD[:, None]
        if num_tokens > 1:
            c, num = draft.config, num_tokens - 1
            like = jnp.zeros((len(newest_B), 1, 3, c.target_hidden_size), draft.precision.compute)
            begin, projected = jax.tree.map(
                lambda x: jnp.broadcast_to(x, (x.shape[0], num, *x.shape[2:])), draft.masked(like)
            )
            # The place of the newest token would read the first proposal; it is masked instead, and gives the second.
            positions_BQ = newest_B[:, None] + jnp.arange(num)[None]
            caches, masked_BQD = through(draft, caches, begin, projected, positions_BQ)
            hidden_BQD = jnp.concatenate([hidden_BQD, masked_BQD], axis=1)
        logits_BQW = draft.logits(hidden_BQD)
        chosen = [choose(logits_BQW[:, j], j) for j in range(num_tokens)]
        proposal = Proposal(*jax.tree.map(lambda *each: jnp.stack(each, axis=1), *chosen))
        return dataclasses.replace(state, caches=caches), proposal
