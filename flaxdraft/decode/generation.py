"""A target writes: batched decoding with a KV cache, greedy or sampled, each row ended by its own stop token.

The loop over tokens runs on the device, many at a time. Answers differ in length, so a row that is done gets the next
prompt: whenever a share of the rows is free, these read their new prompts in a cache of their own, which is then put
into theirs; the other rows pause and cost nothing meanwhile. Where every prompt has a row from the beginning, all are
read at once, and what they have in common (a system prompt, mostly) is read once for all of them.

The same forward passes give the target's features of every token, for those who keep them.

Over a mesh, rows of the target's batches lie apart and what a carry holds beside the cache is whole on every device. So
every process of the mesh reads the same, and takes the same way.

Shape letters: B rows, F fresh rows that read together, P tokens of the longest of their prompts, T tokens of a chunk,
M answer tokens, E target width, V vocabulary, N stop tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from flaxdraft.devices.sharding import everywhere
from flaxdraft.errors import InputError
from flaxdraft.interfaces import AnyArray, Features, Target
from flaxdraft.ops.padding import round_up
from flaxdraft.ops.sampling import sample

# A quarter of the rows read prompts together, always the same number, since each number is compiled.
REFILL_SHARE = 4
TOKENS_AT_A_TIME = 64  # between two looks at the device


def check_sampling(temperature: float, top_p: float) -> None:
    """
    Raises:
        InputError: one of them is out of range.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise InputError(f"sampling: found temperature {temperature} and top_p {top_p}, expected >= 0 and in (0, 1]")


@dataclasses.dataclass(frozen=True)
class Writing:
    """How answers are written.

    Raises:
        InputError: see `check_sampling`.
    """

    max_new_tokens: int
    stop_tokens: Sequence[int]  # each ends an answer, and is its last token
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    prefill_chunk: int = 64  # prompt tokens that are read at a time, at most; bounds memory beside the cache
    multiple: int = 128  # to which lengths are rounded up, since each is compiled
    keep_features: bool = False

    def __post_init__(self):
        check_sampling(self.temperature, self.top_p)


class Written(NamedTuple):
    """One answer."""

    number: int  # of its prompt
    tokens: list[int]  # after the prompt, its stop token included
    # Of prompt and answer, on the host, where they are kept; those of the last token are zero, since the target never
    # reads it. argmax and logsumexp are known from the row before the answer on.
    features: Features | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Carry:
    """Between two tokens. The newest answer token has not been read by the target yet."""

    cache: Any
    length_B: Int[AnyArray, " B"]  # of the prompt
    seed_B: UInt32[AnyArray, " B"]
    answer_BM: Int[AnyArray, "B M"]
    made_B: Int[AnyArray, " B"]  # answer tokens so far
    running_B: Bool[AnyArray, " B"]
    kept: Features | None = None  # of the answer's tokens [B, M, ...]


def _empty(cache: Any, num_rows: int, limit: int) -> _Carry:
    """No row has a prompt; on the host, to be filled in."""

    def zeros(*shape: int, dtype: Any = np.int32) -> np.ndarray:
        return np.zeros((num_rows, *shape), dtype)

    return _Carry(cache, zeros(), zeros(dtype=np.uint32), zeros(limit), zeros(), zeros(dtype=bool))


class _How(NamedTuple):
    """What the compiled programs depend on besides shapes."""

    temperature: float
    top_p: float
    keeps: bool  # features


def _chosen(target: Target, how: _How, last_BE: Float[Array, "B E"], argmax_B, seed_B, made_B) -> Int[Array, " B"]:
    """The next token of each row: a sample by its own seed, so that it does not matter which rows are beside it."""
    if how.temperature == 0:
        return everywhere(argmax_B)
    keys_B = jax.vmap(lambda seed, made: jax.random.fold_in(jax.random.key(seed), made))(seed_B, made_B)
    return sample(everywhere(target.logits(everywhere(last_BE))), keys_B, how.temperature, how.top_p)


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
def _read_chunk(target: Target, how: _How, stops_N, tokens_FT, start, carry: _Carry) -> tuple[_Carry, Features | None]:
    """Prompt tokens `start`, start + 1, ... of all rows into the cache, and their features. Rows whose prompt ends
    among them make their first answer token; rows of padding have no prompt and make none."""
    length_F1, num_slots = carry.length_B[:, None], carry.cache.num_slots
    at_1T = start + jnp.arange(tokens_FT.shape[1])[None]
    cache, out = target.extend(carry.cache, tokens_FT, jnp.where(at_1T < length_F1, at_1T, num_slots), "end")
    here_FT = at_1T == length_F1 - 1
    assert out.last_BTE is not None, "`extend` tells all"
    assert out.argmax_BT is not None, "`extend` tells all"
    last_FTE, argmax_FT = everywhere(out.last_BTE), everywhere(out.argmax_BT)
    last_FE = jnp.sum(jnp.where(here_FT[..., None], last_FTE, 0), axis=1, dtype=last_FTE.dtype)
    argmax_F = jnp.sum(jnp.where(here_FT, argmax_FT, 0), axis=1, dtype=jnp.int32)
    token_F = _chosen(target, how, last_FE, argmax_F, carry.seed_B, jnp.zeros_like(carry.made_B))
    carry = _noted(dataclasses.replace(carry, cache=cache), token_F, jnp.any(here_FT, axis=1), stops_N)
    return carry, jax.tree.map(everywhere, out) if how.keeps else None


@partial(jax.jit, donate_argnames="carry")
def _joined(target: Target, rows_F, read: _Carry, carry: _Carry) -> _Carry:
    """With all that `read` holds in some rows; numbers beyond the last row mark padding, which goes nowhere."""
    cache = target.put_rows(carry.cache, rows_F, read.cache)
    into, new = (dataclasses.replace(one, cache=None, kept=None) for one in (carry, read))
    into = jax.tree.map(lambda x, x_F: x.at[rows_F].set(x_F, mode="drop"), into, new)
    return dataclasses.replace(into, cache=cache, kept=carry.kept)


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
        assert out.last_BTE is not None, "`extend` tells all"
        assert out.argmax_BT is not None, "`extend` tells all"
        token_B = _chosen(target, how, out.last_BTE[:, 0], out.argmax_BT[:, 0], carry.seed_B, made_B)
        kept = carry.kept
        if how.keeps:
            rows_B, kept_at_B = jnp.arange(len(made_B)), jnp.where(running_B, made_B - 1, carry.answer_BM.shape[1])
            keep = lambda all_BM, x_B1: all_BM.at[rows_B, kept_at_B].set(everywhere(x_B1[:, 0]), mode="drop")  # noqa: E731
            kept = jax.tree.map(keep, kept, out)
        return step + 1, _noted(dataclasses.replace(carry, cache=cache, kept=kept), token_B, running_B, stops_N)

    return lax.while_loop(more, one, (jnp.int32(0), carry))[1]


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts share, a multiple of 8; at least one token of each is left."""
    longest = min(map(len, prompts)) - 1
    shared = next((t for t in range(longest) if len({prompt[t] for prompt in prompts}) > 1), longest)
    return shared // 8 * 8


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Prompts in the rows of one batch."""

    target: Target
    writing: Writing
    total: int  # rows
    fresh: int  # rows that read together
    shared: int  # tokens that all prompts begin with, where all rows read together
    prompt_slots: int  # for the longest prompt
    prompt_features: dict[int, list[Features]]  # of each row, in pieces; filled in

    @property
    def _how(self) -> _How:
        return _How(self.writing.temperature, self.writing.top_p, self.writing.keep_features)

    @property
    def _stops_N(self) -> np.ndarray:
        return np.asarray(self.writing.stop_tokens, np.int32)

    @property
    def _num_slots(self) -> int:
        return self.prompt_slots + round_up(self.writing.max_new_tokens, self.writing.multiple)

    def begin(self) -> _Carry:
        """All rows free. Rows that all read together bring their cache with them."""
        limit = self.writing.max_new_tokens
        cache = None if self.fresh == self.total else self.target.new_cache(self.total, self._num_slots)
        return dataclasses.replace(_empty(cache, self.total, limit), kept=self._nothing_kept(limit))

    def _nothing_kept(self, limit: int) -> Features | None:
        if not self.writing.keep_features:
            return None

        def one_token():
            token_B1 = jnp.zeros((self.total, 1), jnp.int32)
            return self.target.extend(self.target.new_cache(self.total, 8), token_B1, token_B1, "all")[1]

        with self.target.on_mesh():
            return jax.tree.map(
                lambda x: np.zeros((self.total, limit, *x.shape[2:]), x.dtype), jax.eval_shape(one_token)
            )

    def with_prompts(self, carry: _Carry, given: Sequence[tuple[int, Sequence[int], int]]) -> _Carry:
        """With new prompts and their seeds in some rows, and the first token of each answer."""
        for at in range(0, len(given), self.fresh):
            carry = self._with_group(carry, given[at : at + self.fresh])
        return carry

    def _with_group(self, carry: _Carry, group: Sequence[tuple[int, Sequence[int], int]]) -> _Carry:
        # Rows that all read together are all free, and get their prompts in their order: no second cache is needed.
        in_place, writing = self.fresh == self.total, self.writing
        longest = max(len(prompt) for _, prompt, _ in group) - self.shared
        chunk = min(writing.prefill_chunk, round_up(longest, writing.multiple))
        tokens_FP = np.zeros((self.fresh, self.shared + round_up(longest, chunk)), np.int32)
        with self.target.on_mesh():
            cache, features = self._begun(group[0][1], self._num_slots if in_place else self.prompt_slots)
            read = _empty(cache, self.fresh, writing.max_new_tokens)
            rows_F, length_F, seed_F = np.full(self.fresh, self.total, np.int32), read.length_B, read.seed_B
            for i, (row, prompt, seed) in enumerate(group):
                tokens_FP[i, : len(prompt)] = prompt
                rows_F[i], length_F[i], seed_F[i] = row, len(prompt), seed
            for start in range(self.shared, tokens_FP.shape[1], chunk):
                tokens_FT = tokens_FP[:, start : start + chunk]
                read, found = _read_chunk(self.target, self._how, self._stops_N, tokens_FT, np.int32(start), read)
                features.append(jax.device_get(found))
            for i, (row, _, _) in enumerate(group if writing.keep_features else ()):
                self.prompt_features[row] = [jax.tree.map(lambda x: x[i], part) for part in features]  # noqa: B023
            return dataclasses.replace(read, kept=carry.kept) if in_place else _joined(self.target, rows_F, read, carry)

    def _begun(self, prompt: Sequence[int], num_slots: int) -> tuple[Any, list[Features]]:
        """A cache for fresh rows that holds what all prompts begin with, and the features of that."""
        if not self.shared:
            return self.target.new_cache(self.fresh, num_slots), []
        tokens_1T = np.asarray(prompt[: self.shared], np.int32)[None]
        at_1T = np.arange(self.shared, dtype=np.int32)[None]
        cache, found = self.target.extend(self.target.new_cache(1, num_slots), tokens_1T, at_1T, "end")
        for_all = lambda x: np.broadcast_to(x, (self.fresh, *x.shape[1:]))  # noqa: E731
        return self.target.fork_cache(cache, self.fresh), [jax.tree.map(for_all, jax.device_get(found))]

    def written(self, carry: _Carry, enough_free: int) -> _Carry:
        """See `_write`."""
        with self.target.on_mesh():
            return _write(self.target, self._how, self._stops_N, np.int32(enough_free), carry)

    def features(self, row: int, num_prompt: int, num_answer: int, kept: Features | None) -> Features | None:
        """Of a row's prompt and answer, where they are kept."""
        if kept is None:
            return None

        def join(answer_BM, *prompt):
            read = np.concatenate(prompt)[:num_prompt]
            return np.concatenate([read, answer_BM[row, : num_answer - 1], np.zeros_like(read[:1])])

        return jax.tree.map(join, kept, *self.prompt_features[row])


def generate_each(
    target: Target,
    prompts: Sequence[Sequence[int]],
    writing: Writing,
    *,
    seeds: Sequence[int] | None = None,
    num_rows: int | None = None,
    on_tokens: Callable[[int], None] = lambda num: None,
) -> Iterator[Written]:
    """Each answer as soon as it is done. It depends on its own prompt and seed alone.

    Prompts are best ordered by length: those that are read together are padded to the longest of them.

    Args:
        seeds: one for each prompt; their numbers 0, 1, ... by default.
        num_rows: prompts that are answered at a time; all of them by default. A quarter of the rows is read anew when
            that many are free, beside a cache of its own; on a mesh a quarter should be at least a row a device.
        on_tokens: called now and then with the number of tokens made since the last call.

    Raises:
        InputError: an empty prompt.
    """
    if not all(len(prompt) for prompt in prompts):
        raise InputError("prompts: found an empty one, expected at least one token each")
    if not prompts:
        return
    seeds = range(len(prompts)) if seeds is None else seeds
    rows = _rows(target, prompts, writing, num_rows or len(prompts))
    total, share = rows.total, rows.fresh
    carry, waiting = rows.begin(), 0
    owner_B, made_B = np.full(total, -1), np.zeros(total, np.int64)  # -1: free
    ready: list[Written] = []
    while waiting < len(prompts) or (owner_B >= 0).any():
        fresh = np.flatnonzero(owner_B < 0)
        if waiting < len(prompts):
            # A few rows more than a share are left for the next time, when they cost no reading of their own.
            whole = len(fresh) - len(fresh) % share if len(fresh) < len(prompts) - waiting else len(prompts) - waiting
            fresh = fresh[:whole]
            owner_B[fresh], made_B[fresh] = np.arange(waiting, waiting + len(fresh)), 0
            given = [(int(row), prompts[i], seeds[i]) for row, i in zip(fresh, owner_B[fresh], strict=True)]
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
        # One read brings the features of all rows, which are large. Once no prompt waits, there is one, at the end.
        is_last = waiting == len(prompts) and not (writing.keep_features and running_B.any())
        if len(done) and (is_last or (~running_B).sum() >= enough_free):
            answers_BM, kept = jax.device_get((carry.answer_BM, carry.kept))
            for row in done.tolist():
                number, made = int(owner_B[row]), int(made_B[row])
                features = rows.features(row, len(prompts[number]), made, kept)
                ready.append(Written(number, answers_BM[row, :made].tolist(), features))
            owner_B[done] = -1
    yield from ready


def _rows(target: Target, prompts: Sequence[Sequence[int]], writing: Writing, num_rows: int) -> _Rows:
    multiple = target.row_multiple
    total = round_up(num_rows, multiple)
    # Where every prompt has a row, all are read at once; else a share of the rows, which the devices divide.
    share = total if total >= len(prompts) else max(total // (REFILL_SHARE * multiple), 1) * multiple
    # A cache of one row is not split over devices.
    shared = common_prefix(prompts) if total >= len(prompts) > 1 and multiple == 1 else 0
    prompt_slots = round_up(max(map(len, prompts)), writing.multiple)
    return _Rows(target, writing, total, share, shared, prompt_slots, {})


def generate(
    target: Target,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int] | None = None,
    num_rows: int | None = None,
    on_tokens: Callable[[int], None] = lambda num: None,
    **writing: Any,
) -> list[list[int]]:
    """The answers of `generate_each` in the order of the prompts.

    Args:
        writing: the fields of `Writing`.
    """
    how = Writing(**writing)
    written = generate_each(target, prompts, how, seeds=seeds, num_rows=num_rows, on_tokens=on_tokens)
    answers = {one.number: one.tokens for one in written}
    return [answers[i] for i in range(len(prompts))]
