"""Real speculative decoding, all of it on the device: draft a chain, verify it in one target pass, keep what is right.
A tree may take the chain's place (`decode/tree.py`).

Two compiled programs: `begin` reads the prompts and makes the first token; `advance` is a loop over target passes
whose carry holds both KV caches (donated, updated in place), the answers, and which rows still run. Rows end by
themselves, at a stop token or at their limit, also inside an accepted run. Greedy output is the target's own, token for
token; sampled output is distributed as the target's own samples (`ops/rejection.py`). A chain of length 0 is the target
alone.

Over a mesh the target is split as its weights are, rows of its batches lie apart, and what the carry holds beside its
cache is whole on every device, the drafter's state too: a draft is small, and reading its weights is what takes time.
So every process of the mesh reads the same, and takes the same way.

Shape letters: B rows, P padded prompt, T positions of a pass (the chain, or a path of the tree, and one more),
Q chain, M answer tokens, E target width, V target vocabulary, W draft vocabulary.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from flaxdraft.decode.tree import Tree, right_path
from flaxdraft.devices.sharding import everywhere
from flaxdraft.interfaces import AnyArray, Draft, Drafter, Features, Proposal, Target
from flaxdraft.ops import rejection
from flaxdraft.ops.sampling import draw, sharpened

PREFILL_CHUNK = 256  # prompt tokens read at a time


@dataclasses.dataclass(frozen=True)
class Program:
    """What a compiled program depends on besides its shapes."""

    drafter: Drafter | None  # None: the target alone, and no draft is needed
    chain_length: int = 0  # draft tokens a target pass
    sampled: bool = False
    top_p: float = 1.0
    tree: Tree | None = None  # instead of a chain, whose length is then 0; greedy only

    @property
    def drafts(self) -> Drafter:
        """The drafter of a program that drafts."""
        assert self.drafter is not None
        return self.drafter

    @property
    def depth(self) -> int:
        """The most draft tokens that a target pass accepts."""
        return self.chain_length if self.tree is None else len(self.tree.widths)


class Space(NamedTuple):
    """How much a row may hold."""

    num_slots: int  # positions of the caches
    num_answer: int  # tokens of the answer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Requests:
    """What stays the same for each row."""

    length_B: Int[AnyArray, " B"]  # of the prompt
    limit_B: Int[AnyArray, " B"]  # answer tokens at most; 0 is padding
    seed_B: UInt32[AnyArray, " B"]
    temperature_B: Float[AnyArray, " B"]

    def keys(self, index_B: Int[Array, " B"]):
        """The key of each row's answer token `index_B`: of its own seed alone."""
        return jax.vmap(lambda seed, index: jax.random.fold_in(jax.random.key(seed), index))(self.seed_B, index_B)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
    """Between two target passes. The newest answer token has not been read by the target yet."""

    cache: Any
    drafting: Any  # the drafter's own state; None where nothing is drafted
    answer_BM: Int[Array, "B M"]
    yield_BM: Int[Array, "B M"]  # tokens that each target pass gave
    num_answer_B: Int[Array, " B"]
    num_pass_B: Int[Array, " B"]
    running_B: Bool[Array, " B"]


def _extended(target: Target, *how: Any) -> tuple[Any, Features]:
    """See `Target.extend`."""
    cache, out = target.extend(*how)
    return cache, jax.tree.map(everywhere, out)


def _is_stop(tokens, stops_N):
    return jnp.any(tokens[..., None] == stops_N.reshape((1,) * tokens.ndim + (-1,)), axis=-1)


def _read_prompts(target: Target, draft: Draft | None, program: Program, tokens_BP, rows: Requests, num_slots: int):
    """The target's cache and the drafter's state after the prompts, and each prompt's last taps, last hidden state and
    argmax.

    The draft's row of the last prompt token is left out: it needs the first answer token.
    """
    num_rows, padded = tokens_BP.shape
    chunk = min(PREFILL_CHUNK, padded)
    cache = target.new_cache(num_rows, num_slots)
    drafting = None if draft is None else program.drafts.start(draft, num_rows, num_slots)
    next_BP = jnp.pad(tokens_BP[:, 1:], ((0, 0), (0, 1)))
    end_B1 = rows.length_B[:, None] - 1

    def read(i, carry):
        cache, drafting, ends = carry
        tokens_BT, next_BT = (lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1) for x in (tokens_BP, next_BP))
        at_1T = i * chunk + jnp.arange(chunk)[None]
        cache, out = _extended(target, cache, tokens_BT, jnp.where(at_1T <= end_B1, at_1T, num_slots), "end")
        found = out.taps_BTKE, out.last_BTE, out.argmax_BT
        here_BT = at_1T == end_B1
        pick = lambda x: jnp.where(jnp.expand_dims(here_BT, tuple(range(2, x.ndim))), x, 0).sum(1, dtype=x.dtype)  # noqa: E731
        ends = jax.tree.map(lambda end, x: end + pick(x), ends, found)
        if draft is not None:
            known_BT = jnp.where(at_1T < end_B1, at_1T, num_slots)
            drafting = program.drafts.read(draft, drafting, out.taps_BTKE, next_BT, known_BT, end_B1[:, 0] * 0)
        return cache, drafting, ends

    probe = jax.ShapeDtypeStruct((num_rows, chunk), jnp.int32)
    _, out = jax.eval_shape(lambda x: target.extend(target.new_cache(num_rows, num_slots), x, x, "end"), probe)
    ends = jax.tree.map(
        lambda x: jnp.zeros((num_rows, *x.shape[2:]), x.dtype), (out.taps_BTKE, out.last_BTE, out.argmax_BT)
    )  # fmt: skip
    return lax.fori_loop(0, padded // chunk, read, (cache, drafting, ends))


def _prefilled(target, draft, program: Program, tokens_BP, rows: Requests, stops_N, space: Space) -> Carry:
    """After the prompts and the first answer token, which comes with them."""
    num_rows, zeros_B = len(tokens_BP), jnp.zeros_like(rows.length_B)
    cache, drafting, ends = _read_prompts(target, draft, program, tokens_BP, rows, space.num_slots)
    taps_BKE, last_BE, first_B = ends
    if program.sampled:
        logits_BV = sharpened(target.logits(last_BE), rows.temperature_B[:, None], program.top_p)
        first_B = draw(logits_BV, rows.keys(zeros_B))
    if draft is not None:
        end_B1 = rows.length_B[:, None] - 1
        drafting = program.drafts.read(draft, drafting, taps_BKE[:, None], first_B[:, None], end_B1, zeros_B)
    answer_BM = jnp.zeros((num_rows, space.num_answer), jnp.int32).at[:, 0].set(first_B)
    running_B = (rows.limit_B > 1) & ~_is_stop(first_B, stops_N)
    return Carry(cache, drafting, answer_BM, jnp.zeros_like(answer_BM), jnp.minimum(rows.limit_B, 1),
                 zeros_B, running_B)  # fmt: skip


def _chooser(program: Program, rows: Requests, keys_B):
    """How the draft picks its tokens: the highest logit; or a sample, and the distribution that it came from."""
    if not program.sampled:
        return lambda logits_BW, j: (jnp.argmax(logits_BW, axis=-1).astype(jnp.int32), None)

    def choose(logits_BW, j):
        logits_BW = sharpened(logits_BW, rows.temperature_B[:, None], program.top_p)
        token_B = draw(logits_BW, jax.vmap(lambda key: jax.random.fold_in(key, j))(keys_B))
        return token_B, jax.nn.softmax(logits_BW, axis=-1)

    return choose


def _verdict(target, draft, program: Program, rows: Requests, out, proposal: Proposal, keys_B):
    """How many draft tokens are right [B], and the tokens that the answer goes on with [B, T], right up to there and
    one further."""
    chain_BQ, q_BQW, num_B = proposal
    if not program.sampled:
        said_BT = out.argmax_BT
        wanted_BQ = said_BT[:, :0] if draft is None else draft.target_ids[...][chain_BQ]
        agree_BQ = (wanted_BQ == said_BT[:, :-1]).astype(jnp.int32)
        if num_B is not None:
            agree_BQ = agree_BQ * (jnp.arange(agree_BQ.shape[1])[None] < num_B[:, None])
        return jnp.sum(jnp.cumprod(agree_BQ, axis=1), axis=1, dtype=jnp.int32), said_BT
    num_rows, num_new = out.argmax_BT.shape
    logits_BTV = target.logits(out.last_BTE.reshape(num_rows * num_new, -1)).reshape(num_rows, num_new, -1)
    logits_BTV = sharpened(logits_BTV, rows.temperature_B[:, None, None], program.top_p)
    if draft is None:
        return jnp.zeros_like(rows.length_B), draw(logits_BTV[:, 0], keys_B)[:, None]
    assert q_BQW is not None, "a sampled program draws its proposals"
    p_BTV, target_ids_W = jax.nn.softmax(logits_BTV, axis=-1), draft.target_ids[...]
    accepted_B, next_B = rejection.verify(p_BTV, q_BQW, chain_BQ, target_ids_W, keys_B, num_B)
    drafted_BT = jnp.pad(target_ids_W[chain_BQ], ((0, 0), (0, 1)))
    return accepted_B, jnp.where(jnp.arange(num_new)[None] == accepted_B[:, None], next_B[:, None], drafted_BT)


def _chain_pass(
    target: Target, draft: Draft | None, program: Program, rows: Requests, carry: Carry, newest_B, token_B1
):
    """Drafts a chain behind the newest token, which is at `newest_B`, and verifies it in one target pass; returns what
    `_tree_pass` does."""
    keys_B, drafting, proposal = rows.keys(carry.num_answer_B), carry.drafting, Proposal(token_B1[:, :0], None)
    if draft is not None:
        draft_keys_B, keys_B = jnp.moveaxis(jax.vmap(jax.random.split)(keys_B), 1, 0)
        drafting, proposal = program.drafts.propose(
            draft, drafting, newest_B, token_B1[:, 0], program.chain_length, _chooser(program, rows, draft_keys_B)
        )
    drafted_BQ = proposal.ids_BQ if draft is None else draft.target_ids[...][proposal.ids_BQ]
    at_BT = jnp.minimum(newest_B[:, None] + jnp.arange(program.chain_length + 1)[None], carry.cache.num_slots)
    tokens_BT = jnp.concatenate([token_B1, drafted_BQ], axis=1)
    cache, out = _extended(target, carry.cache, tokens_BT, at_BT, "all")
    accepted_B, said_BT = _verdict(target, draft, program, rows, out, proposal, keys_B)
    return cache, drafting, accepted_B, said_BT, out.taps_BTKE


def _tree_pass(target: Target, draft: Draft, program: Program, carry: Carry, root_B, token_B1):
    """Drafts a tree and verifies it in one target pass.

    Args:
        root_B: position of the newest token, which the target has not read; the number of slots marks padding.
        token_B1: the newest token.

    Returns:
        The target's cache, as if the accepted path had been a chain, and the drafter's state; how many draft tokens are
        accepted; and along the path, the root first, the target's own next tokens and its taps.
    """
    tree, cache = program.tree, carry.cache
    assert tree is not None
    drafting, drafted_BQ = program.drafts.propose_tree(draft, carry.drafting, root_B, tree)
    tokens_BN = jnp.concatenate([token_B1, draft.target_ids[...][drafted_BQ]], axis=1)
    positions_BN, placement = tree.place(root_B, slice(None), cache.num_slots)
    cache, out = _extended(target, cache, tokens_BN, positions_BN, "all", placement)
    assert out.argmax_BT is not None
    accepted_B, path_BT = right_path(tree, tokens_BN, out.argmax_BT)
    ahead_1T = jnp.arange(1, path_BT.shape[1])[None]
    to_BT = jnp.where(ahead_1T <= accepted_B[:, None], root_B[:, None] + ahead_1T, cache.num_slots)
    cache = target.move_slots(cache, root_B[:, None] + path_BT[:, 1:], to_BT)
    rows_B1 = jnp.arange(len(root_B))[:, None]
    return cache, drafting, accepted_B, out.argmax_BT[rows_B1, path_BT], out.taps_BTKE[rows_B1, path_BT]


def _pass(target: Target, draft: Draft | None, program: Program, rows: Requests, stops_N, carry: Carry) -> Carry:
    """One target pass over every row that runs."""
    running_B, made_B, num_slots = carry.running_B, carry.num_answer_B, carry.cache.num_slots
    newest_B = jnp.where(running_B, rows.length_B + made_B - 1, num_slots)  # its position
    token_B1 = jnp.take_along_axis(carry.answer_BM, jnp.maximum(made_B - 1, 0)[:, None], axis=1)
    if program.tree is None:
        found = _chain_pass(target, draft, program, rows, carry, newest_B, token_B1)
    else:
        assert draft is not None, "a tree is drafted"
        found = _tree_pass(target, draft, program, carry, newest_B, token_B1)
    cache, drafting, accepted_B, said_BT, taps_BTKE = found

    # Rows of accepted tokens are real; the rest are padding for the drafter.
    ahead_1T = jnp.arange(program.depth + 1)[None]
    if draft is not None:
        real_BT = jnp.where(ahead_1T <= accepted_B[:, None], newest_B[:, None] + ahead_1T, num_slots)
        drafting = program.drafts.read(draft, drafting, taps_BTKE, said_BT, real_BT, accepted_B)

    gained_B = jnp.minimum(accepted_B + 1, rows.limit_B - made_B)
    stop_BT = _is_stop(said_BT, stops_N) & (ahead_1T < gained_B[:, None])
    stopped_B = jnp.any(stop_BT, axis=1)
    first_stop_B = jnp.argmax(stop_BT, axis=1).astype(jnp.int32)
    gained_B = jnp.where(running_B, jnp.where(stopped_B, first_stop_B + 1, gained_B), 0)
    end = carry.answer_BM.shape[1]
    rows_B1 = jnp.arange(len(made_B))[:, None]
    answer_at_BT = jnp.where(ahead_1T < gained_B[:, None], made_B[:, None] + ahead_1T, end)
    pass_at_B = jnp.where(running_B, carry.num_pass_B, end)
    return Carry(
        cache, drafting,
        answer_BM=carry.answer_BM.at[rows_B1, answer_at_BT].set(said_BT, mode="drop"),
        yield_BM=carry.yield_BM.at[rows_B1[:, 0], pass_at_B].set(gained_B, mode="drop"),
        num_answer_B=made_B + gained_B, num_pass_B=carry.num_pass_B + running_B,
        running_B=running_B & ~stopped_B & (made_B + gained_B < rows.limit_B),
    )  # fmt: skip


def _merged(graphdef, state) -> Draft | None:
    return None if graphdef is None else nnx.merge(graphdef, state)


@partial(jax.jit, static_argnames=("graphdef", "program", "space"))
def begin(target, graphdef, state, program: Program, tokens_BP, rows, stops_N, space: Space) -> Carry:
    """To be called `on_mesh` of the target, where the draft is whole on every device."""
    return _prefilled(target, _merged(graphdef, state), program, tokens_BP, rows, stops_N, space)


@partial(jax.jit, static_argnames=("graphdef", "program"), donate_argnames="carry")
def advance(target, graphdef, state, program: Program, rows, stops_N, num_passes, carry: Carry) -> Carry:
    """See `begin`."""
    draft = _merged(graphdef, state)

    def more(loop):
        return (loop[0] < num_passes) & jnp.any(loop[1].running_B)

    def one(loop):
        return loop[0] + 1, _pass(target, draft, program, rows, stops_N, loop[1])

    return lax.while_loop(more, one, (0, carry))[1]
