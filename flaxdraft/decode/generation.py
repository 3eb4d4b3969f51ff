"""A target writes: batched decoding with a KV cache, greedy or sampled, each row ended by its own stop token.

The loop over tokens runs on the device, many at a time. Answers differ in length, so a row that is done gets the next
prompt: whenever a share of the rows is free, these read their new prompts in a cache of their own, which is then put
into theirs; the other rows pause and cost nothing meanwhile.

Shape letters: B rows, F fresh rows that read together, P tokens of the longest of their prompts, T tokens of a chunk,
M answer tokens, E target width, V vocabulary, N stop tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import P, lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from flaxdraft.errors import InputError
from flaxdraft.interfaces import Target
from flaxdraft.ops.sampling import sample

# A quarter of the rows read prompts together, always the same number, since each number is compiled.
REFILL_SHARE = 4
TOKENS_AT_A_TIME = 64  # between two looks at the device


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Carry:
    """Between two tokens. The newest answer token has not been read by the target yet."""

    cache: Any
    length_B: Int[Array, " B"]  # of the prompt
    seed_B: UInt32[Array, " B"]
    answer_BM: Int[Array, "B M"]
    made_B: Int[Array, " B"]  # answer tokens so far
    running_B: Bool[Array, " B"]


def _empty(cache: Any, num_rows: int, limit: int) -> _Carry:
    """No row has a prompt; on the host, to be filled in."""
    zeros = lambda *shape, dtype=np.int32: np.zeros((num_rows, *shape), dtype)  # noqa: E731
    return _Carry(cache, zeros(), zeros(dtype=np.uint32), zeros(limit), zeros(), zeros(dtype=bool))


@dataclasses.dataclass(frozen=True)
class _How:
    """What the compiled programs depend on besides shapes."""

    temperature: float
    top_p: float


def _whole(x: jax.Array) -> jax.Array:
    """On every device of the mesh, where there is one: rows of a batch may lie apart, those of a carry never do."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.reshard(x, P())


def _chosen(target: Target, how: _How, last_BE: Float[Array, "B E"], argmax_B, seed_B, made_B) -> Int[Array, " B"]:
    """The next token of each row: a sample by its own seed, so that it does not matter which rows are beside it."""
    if how.temperature == 0:
        return _whole(argmax_B)
    keys_B = jax.vmap(lambda seed, made: jax.random.fold_in(jax.random.key(seed), made))(seed_B, made_B)
    return sample(_whole(target.logits(_whole(last_BE))), keys_B, how.temperature, how.top_p)


def _noted(carry: _Carry, token_B, rows_B: Bool[Array, " B"], stops_N) -> _Carry:
    """With one more token in the answers of `rows_B`."""
    num_rows, limit = carry.answer_BM.shape
    at_B = jnp.where(rows_B, carry.made_B, limit)
    made_B = carry.made_B + rows_B
    stopped_B = jnp.any(token_B[:, None] == stops_N[None], axis=1) | (made_B >= limit)
    return dataclasses.replace(
        carry, answer_BM=carry.answer_BM.at[jnp.arange(num_rows), at_B].set(token_B, mode="drop"), made_B=made_B,
        running_B=jnp.where(rows_B, ~stopped_B, carry.running_B),
    )  # fmt: skip


@partial(jax.jit, static_argnames="how", donate_argnames="carry")
def _read_chunk(target: Target, how: _How, stops_N, tokens_FT, start, carry: _Carry) -> _Carry:
    """Prompt tokens `start`, start + 1, ... of all rows into the cache. Rows whose prompt ends among them make their
    first answer token; rows of padding have no prompt and make none."""
    length_F1, num_slots = carry.length_B[:, None], carry.cache.num_slots
    at_1T = start + jnp.arange(tokens_FT.shape[1])[None]
    cache, out = target.extend(carry.cache, tokens_FT, jnp.where(at_1T < length_F1, at_1T, num_slots), "end")
    here_FT = at_1T == length_F1 - 1
    last_FTE, argmax_FT = _whole(out.last_BTE), _whole(out.argmax_BT)
    last_FE = jnp.sum(jnp.where(here_FT[..., None], last_FTE, 0), axis=1, dtype=last_FTE.dtype)
    argmax_F = jnp.sum(jnp.where(here_FT, argmax_FT, 0), axis=1, dtype=jnp.int32)
    token_F = _chosen(target, how, last_FE, argmax_F, carry.seed_B, jnp.zeros_like(carry.made_B))
    return _noted(dataclasses.replace(carry, cache=cache), token_F, jnp.any(here_FT, axis=1), stops_N)


@partial(jax.jit, donate_argnames="carry")
def _joined(target: Target, rows_F, read: _Carry, carry: _Carry) -> _Carry:
    """With all that `read` holds in some rows; numbers beyond the last row mark padding, which goes nowhere."""
    cache = target.put_rows(carry.cache, rows_F, read.cache)
    into, new = dataclasses.replace(carry, cache=None), dataclasses.replace(read, cache=None)
    into = jax.tree.map(lambda x, x_F: x.at[rows_F].set(x_F, mode="drop"), into, new)
    return dataclasses.replace(into, cache=cache)


@partial(jax.jit, static_argnames="how", donate_argnames="carry")
def _write(target: Target, how: _How, stops_N, enough_free, carry: _Carry) -> _Carry:
    """Tokens of all running rows, until so many rows are free or it is time for a look."""

    def more(loop):
        step, carry = loop
        running = jnp.sum(carry.running_B, dtype=jnp.int32)
        return (step < TOKENS_AT_A_TIME) & (running > 0) & (len(carry.running_B) - running < enough_free)

    def one(loop):
        step, carry = loop
        running_B, made_B = carry.running_B, carry.made_B
        newest_B1 = jnp.take_along_axis(carry.answer_BM, jnp.maximum(made_B - 1, 0)[:, None], axis=1)
        at_B = jnp.where(running_B, carry.length_B + made_B - 1, carry.cache.num_slots)
        cache, out = target.extend(carry.cache, newest_B1, at_B[:, None], "all")
        token_B = _chosen(target, how, out.last_BTE[:, 0], out.argmax_BT[:, 0], carry.seed_B, made_B)
        return step + 1, _noted(dataclasses.replace(carry, cache=cache), token_B, running_B, stops_N)

    return lax.while_loop(more, one, (jnp.int32(0), carry))[1]


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Prompts in the rows of one batch."""

    target: Target
    how: _How
    stops_N: np.ndarray
    chunk: int
    fresh: int  # rows that read together
    prompt_slots: int  # of their cache

    def with_prompts(self, carry: _Carry, given: Sequence[tuple[int, Sequence[int], int]]) -> _Carry:
        """With new prompts and their seeds in some rows, and the first token of each answer."""
        for at in range(0, len(given), self.fresh):
            carry = self._with_group(carry, given[at : at + self.fresh])
        return carry

    def _with_group(self, carry: _Carry, group: Sequence[tuple[int, Sequence[int], int]]) -> _Carry:
        num_rows, limit = carry.answer_BM.shape
        # Rows that all read together are all free, and get their prompts in their order: no second cache is needed.
        in_place = self.fresh == num_rows
        cache = carry.cache if in_place else self.target.new_cache(self.fresh, self.prompt_slots)
        read = _empty(cache, self.fresh, limit)
        longest = max(len(prompt) for _, prompt, _ in group)
        tokens_FP = np.zeros((self.fresh, -(-longest // self.chunk) * self.chunk), np.int32)
        rows_F, length_F, seed_F = np.full(self.fresh, num_rows, np.int32), read.length_B, read.seed_B
        for i, (row, prompt, seed) in enumerate(group):
            tokens_FP[i, : len(prompt)] = prompt
            rows_F[i], length_F[i], seed_F[i] = row, len(prompt), seed
        with self.target.on_mesh():
            for start in range(0, tokens_FP.shape[1], self.chunk):
                tokens_FT = tokens_FP[:, start : start + self.chunk]
                read = _read_chunk(self.target, self.how, self.stops_N, tokens_FT, np.int32(start), read)
            return read if in_place else _joined(self.target, rows_F, read, carry)

    def written(self, carry: _Carry, enough_free: int) -> _Carry:
        """See `_write`."""
        with self.target.on_mesh():
            return _write(self.target, self.how, self.stops_N, np.int32(enough_free), carry)


def generate_each(
    target: Target,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    num_rows: int | None = None,
    prefill_chunk: int = 64,
    on_tokens: Callable[[int], None] = lambda num: None,
) -> Iterator[tuple[int, list[int]]]:
    """(number of the prompt, the tokens after it, its stop token included), each as soon as it is done. An answer
    depends on its own prompt and seed alone.

    Prompts are best ordered by length: those that are read together are padded to the longest of them.

    Args:
        seeds: one for each prompt; their numbers 0, 1, ... by default.
        num_rows: prompts that are answered at a time; all of them by default. A quarter of the rows is read anew when
            that many are free, beside a cache of its own; on a mesh a quarter should be at least a row a device.
        prefill_chunk: prompt tokens that are read at a time, which bounds memory beside the cache.
        on_tokens: called now and then with the number of tokens made since the last call.

    Raises:
        InputError: an empty prompt, or a temperature or top_p out of range.
    """
    if not all(len(prompt) for prompt in prompts):
        raise InputError("prompts: found an empty one, expected at least one token each")
    if temperature < 0 or not 0 < top_p <= 1:
        raise InputError(f"sampling: found temperature {temperature} and top_p {top_p}, expected >= 0 and in (0, 1]")
    if not prompts:
        return
    seeds = range(len(prompts)) if seeds is None else seeds
    total = num_rows or len(prompts)
    total += -total % target.row_multiple
    # Where every prompt has a row, all are read at once; else a share of the rows, which the devices divide.
    multiple = target.row_multiple
    share = total if total >= len(prompts) else max(total // (REFILL_SHARE * multiple), 1) * multiple
    # Few different sizes, since each is compiled: multiples of 128.
    longest = max(map(len, prompts))
    num_slots, prompt_slots = (-(-x // 128) * 128 for x in (longest + max_new_tokens, longest))
    how, stops_N = _How(temperature, top_p), np.asarray(stop_tokens, np.int32)
    rows = _Rows(target, how, stops_N, prefill_chunk, share, prompt_slots)
    carry, waiting = _empty(target.new_cache(total, num_slots), total, max_new_tokens), 0
    owner_B, made_B = np.full(total, -1), np.zeros(total, np.int64)  # -1: free
    ready: list[tuple[int, list[int]]] = []
    while waiting < len(prompts) or (owner_B >= 0).any():
        fresh = np.flatnonzero(owner_B < 0)
        if waiting < len(prompts):
            # A few rows more than a share are left for the next time, when they cost no reading of their own.
            whole = len(fresh) - len(fresh) % share if len(fresh) < len(prompts) - waiting else len(prompts) - waiting
            fresh = fresh[:whole]
            owner_B[fresh], made_B[fresh] = np.arange(waiting, waiting + len(fresh)), 0
            given = [(row, prompts[i], seeds[i]) for row, i in zip(fresh, owner_B[fresh], strict=True)]
            carry = rows.with_prompts(carry, given)
            waiting += len(fresh)
        # Once no prompt waits, nothing is gained by stopping for a free row.
        enough_free = share if waiting < len(prompts) else total + 1
        carry = rows.written(carry, enough_free)
        yield from ready  # the caller works with them while the device writes
        ready = []
        before_B, made_B, running_B = made_B, np.array(carry.made_B), np.asarray(carry.running_B)
        on_tokens(int((made_B - before_B).sum()))
        done = np.flatnonzero((owner_B >= 0) & ~running_B)
        if len(done) and (waiting == len(prompts) or (~running_B).sum() >= enough_free):
            answers_BM = np.asarray(carry.answer_BM)
            ready = [(int(owner_B[row]), answers_BM[row, : made_B[row]].tolist()) for row in done]
            owner_B[done] = -1
    yield from ready


def generate(target: Target, prompts: Sequence[Sequence[int]], **how: Any) -> list[list[int]]:
    """The answers of `generate_each`, which says what the arguments are, in the order of the prompts."""
    answers = dict(generate_each(target, prompts, **how))
    return [answers[i] for i in range(len(prompts))]
