"""What stands in, in test_wire.py, for parts of a run that take time."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxdraft import targets
from flaxdraft.data.documents import Answer
from flaxdraft.decode import decoding
from flaxdraft.evaluate import walk
from flaxdraft.interfaces import Batch, Features
from flaxdraft.ops.step_sums import StepSums
from flaxdraft.train.state import TrainState
from flaxdraft.train.step import StepMetrics

MEAN_MOVES = 0.5  # by which the stand-in of a step moves the running mean; it moves weights by 1


@contextlib.contextmanager
def replaced(module: types.ModuleType, name: str, other: Any) -> Iterator[None]:
    """Under its name in every module of the package that has it."""
    original = getattr(module, name)
    with contextlib.ExitStack() as stack:
        for at, holder in list(sys.modules.items()):
            if at.startswith("flaxdraft") and getattr(holder, name, None) is original:
                stack.enter_context(patch.object(holder, name, other))
        yield


@contextlib.contextmanager
def installed(name: str, module: types.ModuleType) -> Iterator[None]:
    """A module as if it were installed. Whatever else is imported meanwhile stays: PyTorch crashes when it is imported
    twice, which it would be if all of sys.modules were restored."""
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


def _says(target: Any, tokens: np.ndarray) -> Features:
    """Features that depend on the target's weights, its tapped layers and the token."""
    embeds = np.asarray(target.embedding(), np.float32)[tokens]
    taps = np.stack([embeds * (layer + 1) for layer in target.config.tap_layers], axis=-2)
    argmax = (tokens.astype(np.int32) + 1) % len(target.embedding())
    return Features(taps, embeds, argmax, np.full(tokens.shape, 5.0, np.float32))


def _words(prompt, num: int) -> np.ndarray:
    """An answer of so many tokens, none of which ends it."""
    return 10 + (len(prompt) + np.arange(num)) % 40


def features(target: Any, batch: Batch) -> Features:
    return jax.tree.map(jnp.asarray, _says(target, np.asarray(batch.tokens_BT)))


def answer(target, prompts, max_new_tokens, stop_tokens, num_rows, on_step) -> list[Answer]:
    rows = []
    for prompt in prompts:
        tokens = np.concatenate([prompt, _words(prompt, max_new_tokens)]).astype(np.int32)
        rows.append(Answer(tokens, len(prompt), _says(target, tokens)))
    on_step(max_new_tokens * len(prompts))
    return rows


def evaluated(params: nnx.State, rows, algorithm, batch, multiple=32, *, told: list[set[int]]) -> walk.TeacherForced:
    """As of a draft that is always right; the loss shows which weights were evaluated."""
    told.append({row.num_answer for row in rows})
    length = _positions(algorithm)
    yields = [walk.walk([length] * len(row.tokens), row.num_prompt, row.num_answer) for row in rows]
    passes, gained = np.int64(sum(map(len, yields))), np.int64(sum(map(sum, yields)))
    loss = np.full(length, np.mean(jax.device_get(jax.tree.leaves(params)[0])))
    sums = dataclasses.replace(_no_sums(algorithm, np), loss_J=loss, loss_count_J=np.ones(length, int))
    return walk.TeacherForced(walk.Part(sums, passes, gained), yields)


def _positions(algorithm) -> int:
    """Draft tokens of a pass, where the algorithm says it."""
    return getattr(algorithm, "num_tokens", None) or getattr(algorithm.settings, "ttt_length", 1)


def _no_sums(algorithm, xp=jnp) -> StepSums:
    length = _positions(algorithm)
    zeros, none = (xp.zeros(length, dtype) for dtype in (xp.float32, xp.int32))
    return StepSums(zeros, none, none, none, none, zeros, (1.0,) * length)


class Call(NamedTuple):
    """One decoding with a draft."""

    num_prompts: int
    settings: decoding.Settings


_load, _loaded = targets.load_target, {}


def load_once(opened: targets.OpenedTarget, **how: Any) -> targets.LoadedTarget:
    key = repr((opened.path, how))
    if key not in _loaded:
        _loaded[key] = _load(opened, **how)
    return _loaded[key]


def decoding_of(calls: list[Call]) -> type:
    class Decoding:
        """Answers as long as they may be, of a draft that is always right."""

        def __init__(self, target, draft, prompts, settings, **more):
            self._prompts, self._settings, self.num_tokens = prompts, settings, len(prompts)

        def advance(self, num_passes=0):
            self.num_tokens = len(self._prompts) * self._settings.max_new_tokens
            return False

        def finish(self):
            return self.answers()

        def answers(self):
            most, length = self._settings.max_new_tokens, self._settings.chain_length
            if length:
                calls.append(Call(len(self._prompts), self._settings))
            yields = walk.walk([length] * most, 1, most)
            return [decoding.Decoded(_words(prompt, most).tolist(), yields) for prompt in self._prompts]

    return Decoding


def moving(algorithm: Any, loss: float) -> Callable:
    """A step that adds 1 to every weight."""

    def step(state: TrainState, frozen, example) -> tuple[TrainState, StepMetrics]:
        moved = dataclasses.replace(
            state, step=state.step + 1, params=jax.tree.map(lambda x: x + 1, state.params),
            ema=jax.tree.map(lambda x: x + MEAN_MOVES, state.ema),
        )  # fmt: skip
        return moved, StepMetrics(jnp.float32(loss), jnp.float32(1.0), _no_sums(algorithm), state.skipped)

    return step


def weights_as_gradients(terms, params, example, num, compute):
    """The weights as their own gradients: the rest of the step is what it is, and lowers quickly."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(terms, params, example)[1]), params
