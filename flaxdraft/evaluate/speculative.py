"""Real greedy speculative decoding: a chain of draft tokens, one target pass to verify them, KV caches on both sides.

A draft row p holds (tapped states at p, token x_{p+1}); its cache slot is p. After each pass the rows of the accepted
tokens are written again from the target's real states, as engines do ("draft extend").

Shape letters: B rows, T new positions, S slots, K key/value heads, H key width, C value width, D draft width, Q chain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from flaxdraft.data.generation import pad_prompts, round_up
from flaxdraft.interfaces import Draft, Target
from flaxdraft.ops.attention import attend_cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftCache:
    k_BKHS: Float[Array, "B K H S"]
    v_BKSC: Float[Array, "B K S C"]


def _cached_layer(draft: Draft, cache: DraftCache, embeds_BTD, hidden_BTD, positions_BT):
    """The draft layer on new rows against its cache; positions beyond the last slot mark padding."""
    projections = draft.projections(draft.token_projections(embeds_BTD), hidden_BTD)
    k, v = draft.key_value(projections, positions_BT)
    rows_B1 = jnp.arange(hidden_BTD.shape[0])[:, None]
    cache = DraftCache(
        cache.k_BKHS.at[rows_B1, :, :, positions_BT].set(k, mode="drop"),
        cache.v_BKSC.at[rows_B1, :, positions_BT].set(v, mode="drop"),
    )
    visible_BTS = jnp.arange(cache.k_BKHS.shape[-1])[None, None, :] <= positions_BT[:, :, None]
    q = draft.query(projections, positions_BT)
    heads = attend_cache(q, cache.k_BKHS, cache.v_BKSC, visible_BTS, draft.softmax_scale)
    return cache, draft.finish(hidden_BTD, heads)


def new_draft_cache(draft: Draft, num_rows: int, num_slots: int) -> DraftCache:
    """Empty; the shapes come from the draft's own projections."""
    probe = jax.ShapeDtypeStruct((num_rows, num_slots, draft.config.hidden_size), draft.precision.compute)
    positions = jax.ShapeDtypeStruct((num_rows, num_slots), jnp.int32)

    def keys(embeds_BTD, positions_BT):
        return draft.key_value(draft.projections(draft.token_projections(embeds_BTD), embeds_BTD), positions_BT)

    k, v = jax.eval_shape(keys, probe, positions)
    (B, S, K, H), C = k.shape, v.shape[-1]
    return DraftCache(jnp.zeros((B, K, H, S), k.dtype), jnp.zeros((B, K, S, C), v.dtype))


@partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def extend(graphdef, state, cache: DraftCache, taps_BT3E, next_tokens_BT, positions_BT, last_B):
    """Rows with real target states: row p takes the taps of p and token x_{p+1}. Returns the hidden state of row
    `last_B` of each batch entry, from which the chain starts."""
    draft = nnx.merge(graphdef, state)
    hidden = draft.project(taps_BT3E.astype(draft.precision.compute))
    cache, hidden = _cached_layer(draft, cache, draft.embed(next_tokens_BT), hidden, positions_BT)
    return cache, hidden[jnp.arange(hidden.shape[0]), last_B]


@partial(jax.jit, static_argnames=("graphdef", "chain_length"), donate_argnames="cache")
def propose(graphdef, state, cache: DraftCache, hidden_BD, position_B, chain_length: int):
    """Greedy chain: `chain_length` target ids. hidden_BD is the output of the row at position_B."""
    draft = nnx.merge(graphdef, state)
    tokens, hidden = [], hidden_BD[:, None]
    for j in range(chain_length):
        if j > 0:
            embeds, positions = draft.embed(tokens[-1]), (position_B + j)[:, None]
            cache, hidden = _cached_layer(draft, cache, embeds, hidden, positions)
        tokens.append(draft.target_ids[...][jnp.argmax(draft.logits(hidden), axis=-1)])
    return cache, jnp.concatenate(tokens, axis=1)


@dataclasses.dataclass(frozen=True)
class Decoded:
    """One answer: its tokens, and how many of them each target pass yielded (the first came with the prefill)."""

    tokens: list[int]
    yields: list[int]


def decode(
    target: Target,
    draft_graphdef: nnx.GraphDef,
    draft_state: nnx.State,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    chain_length: int,
    end_token: int,
    on_pass: Callable[[int, int], None] = lambda num_rows, num_tokens: None,
) -> list[Decoded]:
    """Decodes all prompts as one batch; the answers are those of plain greedy decoding, token for token.

    Args:
        on_pass: called after each target pass with the rows that took part and the tokens that they gained.
    """
    num = len(prompts)
    longest = round_up(max(map(len, prompts)), 32)
    num_slots = longest + round_up(max_new_tokens + chain_length, 32)
    tokens, positions = pad_prompts(prompts, longest, num_slots)
    lengths = np.array([len(prompt) for prompt in prompts])
    arange = np.arange(num)
    cache, out = target.extend(target.new_cache(num, num_slots), jnp.asarray(tokens), jnp.asarray(positions), "end")
    first = np.asarray(out.argmax_BT)[arange, lengths - 1]
    # Row p reads x_{p+1}: the prompt shifted left, its last slot filled with the first answer token.
    shifted = np.concatenate([tokens[:, 1:], np.zeros((num, 1), np.int32)], axis=1)
    shifted[arange, lengths - 1] = first
    draft_cache = new_draft_cache(nnx.merge(draft_graphdef, draft_state), num, num_slots)
    draft_cache, hidden = extend(
        draft_graphdef, draft_state, draft_cache, out.taps_BT3E, shifted, positions, lengths - 1
    )
    answers = [[int(token)] for token in first]
    yields: list[list[int]] = [[] for _ in prompts]
    running = np.array([answer[-1] != end_token and max_new_tokens > 1 for answer in answers])
    while running.any():
        # Position of the newest token, which the target has not read yet.
        newest = np.array([length + len(answer) - 1 for length, answer in zip(lengths, answers, strict=True)])
        row = np.where(running, newest - 1, num_slots)
        draft_cache, chain = propose(draft_graphdef, draft_state, draft_cache, hidden, row, chain_length)
        chain = np.asarray(chain)
        verify = np.concatenate([np.array([[answer[-1]] for answer in answers], np.int32), chain], axis=1)
        at = newest[:, None] + np.arange(chain_length + 1)
        at = np.where(running[:, None], at, num_slots).astype(np.int32)
        cache, out = target.extend(cache, jnp.asarray(verify), jnp.asarray(at), "all")
        said = np.asarray(out.argmax_BT)
        accepted = np.cumprod(chain == said[:, :-1], axis=1).sum(axis=1)
        # Only rows of accepted tokens are real; the rest are padding for the draft's cache.
        keep = np.arange(chain_length + 1) <= accepted[:, None]
        draft_cache, hidden = extend(
            draft_graphdef, draft_state, draft_cache, out.taps_BT3E, said, np.where(keep, at, num_slots), accepted
        )
        took_part = np.flatnonzero(running)
        for i in took_part:
            new = said[i, : accepted[i] + 1].tolist()[: max_new_tokens - len(answers[i])]
            if end_token in new:
                new = new[: new.index(end_token) + 1]
            answers[i] += new
            yields[i].append(len(new))
            running[i] = answers[i][-1] != end_token and len(answers[i]) < max_new_tokens
        on_pass(len(took_part), sum(yields[i][-1] for i in took_part))
    return [Decoded(answer, gained) for answer, gained in zip(answers, yields, strict=True)]
