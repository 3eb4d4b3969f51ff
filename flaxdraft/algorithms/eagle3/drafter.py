"""How an EAGLE-3 draft proposes, with its KV cache, run as engines run it: chains and trees.

Row p holds (tapped states at p, token x_{p+1}); its cache slot is p. A chain goes on from a real row with the draft's
own states; after each target pass the rows of the accepted tokens are written again from the target's real states
("draft extend"), so what a chain wrote is never read later. See `interfaces.Drafter`.

Shape letters: B rows, T new positions, S slots, K key/value heads (of taps: tapped layers), H key width, C value width,
D draft width, E target width, W draft vocabulary, Q draft tokens.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from flaxdraft.algorithms.eagle3.surface import Draft
from flaxdraft.decode.tree import Tree
from flaxdraft.interfaces import Chooser, Placement, Proposal
from flaxdraft.nn.rope import turning_positions
from flaxdraft.ops.attention import attend_cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftCache:
    k_BKHS: Float[Array, "B K H S"]
    v_BKSC: Float[Array, "B K S C"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChainState:
    """Between two proposals."""

    cache: DraftCache
    hidden_BD: Float[Array, "B D"]  # of the last real row, from which the next chain or tree starts


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
    num_slots = cache.k_BKHS.shape[-1]
    if placement is None:
        every_S = jnp.arange(num_slots)
        placement = Placement(positions_BT, every_S[None, None, :] <= positions_BT[:, :, None])
    projections = draft.projections(draft.token_projections(embeds_BTD), hidden_BTD)
    turning_BT = turning_positions(positions_BT, num_slots)
    k, v = draft.key_value(projections, turning_BT)
    rows_B1 = jnp.arange(hidden_BTD.shape[0])[:, None]
    cache = DraftCache(
        cache.k_BKHS.at[rows_B1, :, :, placement.slots_BT].set(k, mode="drop"),
        cache.v_BKSC.at[rows_B1, :, placement.slots_BT].set(v, mode="drop"),
    )
    q = draft.query(projections, turning_BT)
    heads = attend_cache(q, cache.k_BKHS, cache.v_BKSC, placement.visible_BTS, draft.softmax_scale)
    return cache, draft.finish(hidden_BTD, heads)


@dataclasses.dataclass(frozen=True)
class ChainDrafter:
    """Chains of any length, and trees."""

    most_tokens = None
    trees = True

    def start(self, draft: Draft, num_rows: int, num_slots: int) -> ChainState:
        hidden_BD = jnp.zeros((num_rows, draft.config.hidden_size), draft.precision.compute)
        return ChainState(new_draft_cache(draft, num_rows, num_slots), hidden_BD)

    def read(
        self, draft: Draft, state: ChainState, taps_BTKE: Float[Array, "B T K E"], next_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"], last_B: Int[Array, " B"],
    ) -> ChainState:  # fmt: skip
        """Rows with real target states: row p takes the taps of p and token x_{p+1}."""
        hidden = draft.project(taps_BTKE.astype(draft.precision.compute))
        cache, hidden = cached_layer(draft, state.cache, draft.embed(next_BT), hidden, positions_BT)
        return ChainState(cache, hidden[jnp.arange(hidden.shape[0]), last_B])

    def propose(
        self, draft: Draft, state: ChainState, newest_B: Int[Array, " B"], token_B: Int[Array, " B"], num_tokens: int,
        choose: Chooser,
    ) -> tuple[ChainState, Proposal]:  # fmt: skip
        """A chain behind the last real row, which is the one before the newest token and has read that token."""

        def step(carry, j):
            cache, hidden_BD, chosen_B = carry
            embeds_B1D = draft.embed(draft.target_ids[...][chosen_B][:, None])
            positions_B1 = (newest_B - 1 + j)[:, None]
            cache, hidden_B1D = cached_layer(draft, cache, embeds_B1D, hidden_BD[:, None], positions_B1)
            chosen_B, more = choose(draft.logits(hidden_B1D)[:, 0], j)
            return (cache, hidden_B1D[:, 0], chosen_B), (chosen_B, more)

        first = choose(draft.logits(state.hidden_BD[:, None])[:, 0], 0)
        carry = state.cache, state.hidden_BD, first[0]
        (cache, _, _), rest = lax.scan(step, carry, jnp.arange(1, num_tokens))
        joined = jax.tree.map(
            lambda one, more: jnp.concatenate([one[:, None], jnp.moveaxis(more, 0, 1)], 1), first, rest
        )  # fmt: skip
        return dataclasses.replace(state, cache=cache), Proposal(*joined)

    def propose_tree(
        self, draft: Draft, state: ChainState, newest_B: Int[Array, " B"], tree: Tree
    ) -> tuple[ChainState, Int[Array, "B Q"]]:
        """The draft runs once for each depth, over all its nodes."""
        cache, hidden_BTD, levels = state.cache, state.hidden_BD[:, None], []
        for depth, width in enumerate(tree.widths):
            if depth:
                positions_BT, placement = tree.place(newest_B - 1, tree.level(depth), cache.k_BKHS.shape[-1])
                parents_BTD = jnp.repeat(hidden_BTD, tree.widths[depth - 1], axis=1)
                embeds_BTD = draft.embed(draft.target_ids[...][levels[-1]])
                cache, hidden_BTD = cached_layer(draft, cache, embeds_BTD, parents_BTD, positions_BT, placement)
            children = lax.top_k(draft.logits(hidden_BTD), width)[1]
            levels.append(children.reshape(len(newest_B), -1))
        return dataclasses.replace(state, cache=cache), jnp.concatenate(levels, axis=1)
