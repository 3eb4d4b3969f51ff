"""A draft with its KV cache, run as engines run it.

Row p holds (tapped states at p, token x_{p+1}); its cache slot is p. A chain goes on from a real row with the draft's
own states; after each target pass the rows of the accepted tokens are written again from the target's real states
("draft extend"), so what a chain wrote is never read later.

Shape letters: B rows, T new positions, S slots, K key/value heads, H key width, C value width, D draft width,
E target width, W draft vocabulary, Q chain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from flaxdraft.interfaces import Draft, Placement
from flaxdraft.ops.attention import attend_cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftCache:
    k_BKHS: Float[Array, "B K H S"]
    v_BKSC: Float[Array, "B K S C"]


def new_draft_cache(draft: Draft, num_rows: int, num_slots: int) -> DraftCache:
    """Empty; the shapes come from the draft's own projections."""
    probe = jax.ShapeDtypeStruct((num_rows, num_slots, draft.config.hidden_size), draft.precision.compute)
    positions = jax.ShapeDtypeStruct((num_rows, num_slots), jnp.int32)

    def keys(embeds_BTD, positions_BT):
        return draft.key_value(draft.projections(draft.token_projections(embeds_BTD), embeds_BTD), positions_BT)

    k, v = jax.eval_shape(keys, probe, positions)
    (B, S, K, H), C = k.shape, v.shape[-1]
    return DraftCache(jnp.zeros((B, K, H, S), k.dtype), jnp.zeros((B, K, S, C), v.dtype))


def cached_layer(
    draft: Draft,
    cache: DraftCache,
    embeds_BTD: Float[Array, "B T D"],
    hidden_BTD: Float[Array, "B T D"],
    positions_BT: Int[Array, "B T"],
    placement: Placement | None = None,
) -> tuple[DraftCache, Float[Array, "B T D"]]:
    """The draft layer on new rows against its cache; positions beyond the last slot mark padding. Without a placement
    every row lies at its position and sees all up to it."""
    if placement is None:
        every_S = jnp.arange(cache.k_BKHS.shape[-1])
        placement = Placement(positions_BT, every_S[None, None, :] <= positions_BT[:, :, None])
    projections = draft.projections(draft.token_projections(embeds_BTD), hidden_BTD)
    k, v = draft.key_value(projections, positions_BT)
    rows_B1 = jnp.arange(hidden_BTD.shape[0])[:, None]
    cache = DraftCache(
        cache.k_BKHS.at[rows_B1, :, :, placement.slots_BT].set(k, mode="drop"),
        cache.v_BKSC.at[rows_B1, :, placement.slots_BT].set(v, mode="drop"),
    )
    q = draft.query(projections, positions_BT)
    heads = attend_cache(q, cache.k_BKHS, cache.v_BKSC, placement.visible_BTS, draft.softmax_scale)
    return cache, draft.finish(hidden_BTD, heads)


def extend(
    draft: Draft,
    cache: DraftCache,
    taps_BT3E: Float[Array, "B T 3 E"],
    next_tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    last_B: Int[Array, " B"],
) -> tuple[DraftCache, Float[Array, "B D"]]:
    """Rows with real target states: row p takes the taps of p and token x_{p+1}. Returns the hidden state of entry
    `last_B` of each batch row, from which a chain starts."""
    hidden = draft.project(taps_BT3E.astype(draft.precision.compute))
    cache, hidden = cached_layer(draft, cache, draft.embed(next_tokens_BT), hidden, positions_BT)
    return cache, hidden[jnp.arange(hidden.shape[0]), last_B]


def propose(
    draft: Draft,
    cache: DraftCache,
    hidden_BD: Float[Array, "B D"],
    row_B: Int[Array, " B"],
    chain_length: int,
    choose: Callable[[Float[Array, "B W"], Any], tuple[Int[Array, " B"], Any]],
) -> tuple[DraftCache, Int[Array, "B Q"], Any]:
    """A chain of draft ids, and whatever else `choose` returned for each, its axis Q after B.

    Args:
        hidden_BD: the output of row `row_B`.
        choose: token ids and more from the logits of step j.
    """

    def step(carry, j):
        cache, hidden_BD, token_B = carry
        embeds_B1D = draft.embed(draft.target_ids[...][token_B][:, None])
        cache, hidden_B1D = cached_layer(draft, cache, embeds_B1D, hidden_BD[:, None], (row_B + j)[:, None])
        chosen_B, more = choose(draft.logits(hidden_B1D)[:, 0], j)
        return (cache, hidden_B1D[:, 0], chosen_B), (chosen_B, more)

    first = choose(draft.logits(hidden_BD[:, None])[:, 0], 0)
    (cache, _, _), rest = lax.scan(step, (cache, hidden_BD, first[0]), jnp.arange(1, chain_length))
    chain = jax.tree.map(lambda one, more: jnp.concatenate([one[:, None], jnp.moveaxis(more, 0, 1)], 1), first, rest)
    return cache, *chain
