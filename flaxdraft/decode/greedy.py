"""Batched greedy decoding with a KV cache; the features fall out of the same forward passes.

Shape letters: B rows, T padded prompt length, E target width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flaxdraft.interfaces import Features, Target


@dataclasses.dataclass(frozen=True)
class Row:
    """One answered prompt with its features, unpadded. Arrays are on the host.

    The features of the last token are zero: nothing comes after it, so the target never reads it.
    """

    tokens: np.ndarray  # int32 [L]
    num_prompt: int  # tokens before the answer
    features: Features  # leading axis L

    @property
    def num_answer(self) -> int:
        return len(self.tokens) - self.num_prompt


def pad_prompts(prompts: Sequence[Sequence[int]], length: int, num_slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded tokens and positions [B, length]; padding sits at position num_slots, which no cache has."""
    tokens = np.zeros((len(prompts), length), np.int32)
    positions = np.full((len(prompts), length), num_slots, np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)] = prompt
        positions[i, : len(prompt)] = np.arange(len(prompt))
    return tokens, positions


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts share (a system prompt, mostly), a multiple of 8; at least one token of each is left."""
    longest = min(map(len, prompts)) - 1
    shared = next((t for t in range(longest) if len({prompt[t] for prompt in prompts}) > 1), longest)
    return shared // 8 * 8


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def answer_greedily(
    target: Target,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_token: int,
    num_rows: int,
    on_step: Callable[[int], None],
) -> list[Row]:
    """The target's own greedy answers, with taps, last hidden state, argmax and logsumexp of every position.

    Args:
        num_rows: rows of the compiled batch (>= len(prompts); the rest is padding).
        on_step: called with the number of tokens made by each decoding step.
    """
    num = len(prompts)
    filled = [*prompts, *([prompts[0]] * (num_rows - num))]
    lengths = np.array([len(prompt) for prompt in filled])
    shared = common_prefix(filled)
    longest = shared + round_up(int(lengths.max()) - shared, 32)
    num_slots = longest + round_up(max_new_tokens, 32)
    cache, prompt_features = _prefill(target, filled, shared, longest, num_slots)
    next_token = prompt_features.argmax_BT[np.arange(num_rows), lengths - 1]
    answers, steps = [next_token], []
    running = (next_token != end_token) & (np.arange(num_rows) < num)
    on_step(num)
    while running.any() and len(answers) < max_new_tokens:
        at = np.where(running, lengths + len(answers) - 1, num_slots)
        cache, out = target.extend(cache, jnp.asarray(next_token[:, None]), jnp.asarray(at[:, None]), "all")
        out = jax.device_get(out)
        steps.append(out)
        next_token = out.argmax_BT[:, 0]
        answers.append(next_token)
        on_step(int(running.sum()))
        running = running & (next_token != end_token)
    answers = np.stack(answers, axis=1)
    return [
        _assemble(i, filled[i], answers[i], end_token, prompt_features, steps)
        for i in range(num)
    ]  # fmt: skip


def _prefill(target: Target, prompts, shared: int, longest: int, num_slots: int):
    """Cache and features of all prompts; the prefix that they share is computed once."""
    tokens, positions = pad_prompts(prompts, longest, num_slots)
    if shared == 0:
        cache, out = target.extend(target.new_cache(len(prompts), num_slots), tokens, positions, "end")
        return cache, jax.device_get(out)
    cache, before = target.extend(target.new_cache(1, num_slots), tokens[:1, :shared], positions[:1, :shared], "end")
    cache = target.fork_cache(cache, len(prompts))
    cache, after = target.extend(cache, tokens[:, shared:], positions[:, shared:], "end")

    def join(one, rest):
        return np.concatenate([np.broadcast_to(one, (len(prompts), *one.shape[1:])), rest], axis=1)

    return cache, jax.tree.map(join, *jax.device_get((before, after)))


def _assemble(i: int, prompt, answer: np.ndarray, end_token: int, prompt_features: Features, steps) -> Row:
    ends = np.flatnonzero(answer == end_token)
    answer = answer[: ends[0] + 1] if ends.size else answer

    def join(name):
        before = getattr(prompt_features, name)[i, : len(prompt)]
        after = [getattr(step, name)[i] for step in steps[: len(answer) - 1]]
        return np.concatenate([before, *after, np.zeros_like(before[:1])])

    features = Features(**{field.name: join(field.name) for field in dataclasses.fields(Features)})
    return Row(np.concatenate([np.asarray(prompt, np.int32), answer.astype(np.int32)]), len(prompt), features)
