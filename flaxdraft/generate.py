"""A target writes: batched decoding with a KV cache, greedy or sampled, each row ended by its own stop token.

Shape letters: B rows, T tokens of a chunk, E target width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np

from flaxdraft.errors import InputError
from flaxdraft.interfaces import Features, Target
from flaxdraft.ops.sampling import sample


def prefill(target: Target, cache, prompts: Sequence[Sequence[int]], num_slots: int, chunk: int):
    """The cache after every prompt, and each row's last hidden state [B, E] with its argmax [B].

    Prompts are read `chunk` tokens at a time, which bounds memory and keeps the number of compiled shapes at one.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    padded = -(-int(lengths.max()) // chunk) * chunk
    tokens = np.zeros((len(prompts), padded), np.int32)
    positions = np.full((len(prompts), padded), num_slots, np.int32)  # padding sits in no slot
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)] = prompt
        positions[i, : len(prompt)] = np.arange(len(prompt))
    rows, argmax = np.arange(len(prompts)), np.zeros(len(prompts), np.int32)
    last = None
    for start in range(0, padded, chunk):
        span = slice(start, start + chunk)
        cache, out = target.extend(cache, tokens[:, span], positions[:, span], "end")
        ends = (lengths - 1) // chunk * chunk == start
        if not ends.any():
            continue
        inside = np.where(ends, lengths - 1 - start, 0)
        # On the host: the rows may be split over devices.
        here = np.asarray(out.last_BTE)[rows, inside]
        last = here if last is None else np.where(ends[:, None], here, last)
        argmax = np.where(ends, np.asarray(out.argmax_BT)[rows, inside], argmax)
    return cache, last, argmax


@partial(jax.jit, static_argnames=("temperature", "top_p"))
def _draw(logits_BV, seeds_B, step, temperature: float, top_p: float):
    keys_B = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(seeds_B)
    return sample(logits_BV, keys_B, temperature, top_p)


def generate(
    target: Target,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    prefill_chunk: int = 256,
    on_step: Callable[[int], None] = lambda num: None,
) -> list[list[int]]:
    """The tokens after each prompt, its stop token included. A row depends on its own prompt and seed alone.

    Args:
        seeds: one for each row; their numbers 0, 1, ... by default.
        on_step: called with the number of tokens that a decoding step made.

    Raises:
        InputError: an empty prompt, or a temperature or top_p out of range.
    """
    if not all(len(prompt) for prompt in prompts):
        raise InputError("prompts: found an empty one, expected at least one token each")
    if temperature < 0 or not 0 < top_p <= 1:
        raise InputError(f"sampling: found temperature {temperature} and top_p {top_p}, expected >= 0 and in (0, 1]")
    num = len(prompts)
    prompts = [*prompts, *([prompts[0]] * (-num % target.row_multiple))]
    lengths = np.array([len(prompt) for prompt in prompts])
    num_slots = -(-(int(lengths.max()) + max_new_tokens) // 64) * 64
    seeds_B = np.zeros(len(prompts), np.uint32)
    seeds_B[:num] = range(num) if seeds is None else seeds

    def choose(last_BE, argmax_B, step):
        if temperature == 0:
            return np.asarray(argmax_B)
        return np.asarray(_draw(np.asarray(target.logits(last_BE)), seeds_B, step, temperature, top_p))

    chunk = min(prefill_chunk, -(-int(lengths.max()) // 32) * 32)
    cache, *found = prefill(target, target.new_cache(len(prompts), num_slots), prompts, num_slots, chunk)
    stops, answers = np.asarray(stop_tokens, np.int64), []
    running = np.arange(len(prompts)) < num
    for step in range(max_new_tokens):
        token = choose(*found, step)
        answers.append(np.where(running, token, -1))
        on_step(int(running.sum()))
        running = running & ~np.isin(token, stops)
        if not running.any() or step + 1 == max_new_tokens:
            break
        at = np.where(running, lengths + step, num_slots).astype(np.int32)
        out: Features
        cache, out = target.extend(cache, token[:, None].astype(np.int32), at[:, None], "all")
        found = np.asarray(out.last_BTE)[:, 0], np.asarray(out.argmax_BT)[:, 0]
    return [[int(token) for token in row if token >= 0] for row in np.stack(answers, axis=1)[:num]]
