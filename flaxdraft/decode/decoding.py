"""Decoding from the host's side: prompts in, answers out, a few target passes at a time.

See `speculative` for what runs on the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from flaxdraft.decode.generation import check_sampling
from flaxdraft.decode.speculative import PREFILL_CHUNK, Carry, Program, Requests, Space, advance, begin
from flaxdraft.decode.tree import Tree
from flaxdraft.devices.weight_places import on_every_device
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Drafter, Target
from flaxdraft.ops.padding import round_up

PASSES_AT_A_TIME = 16  # between two reports of progress


class ReadyDraft(NamedTuple):
    """A draft that can decode with its target: structure, state (float32 or narrower), and how it proposes."""

    graphdef: nnx.GraphDef
    state: nnx.State
    drafter: Drafter


def beside(target: Target, draft: ReadyDraft) -> ReadyDraft:
    """A draft where it decodes with that target: whole on each of its devices."""
    return draft if target.mesh is None else draft._replace(state=on_every_device(draft.state, target.mesh))


@dataclasses.dataclass(frozen=True)
class Decoded:
    """One answer: its tokens, and how many of them each target pass yielded (the first came with the prefill)."""

    tokens: list[int]
    yields: list[int]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How answers are decoded."""

    max_new_tokens: int
    chain_length: int  # draft tokens a target pass; 0: the target alone
    stop_tokens: tuple[int, ...]
    temperature: float = 0.0
    top_p: float = 1.0
    tree: tuple[int, ...] = ()  # children of a node by depth: a tree instead of a chain, whose length is then 0

    def __post_init__(self):
        check_sampling(self.temperature, self.top_p)
        if self.tree and (self.temperature > 0 or self.chain_length > 0):
            raise InputError(
                f"tree: found one with temperature {self.temperature:g} and a chain of {self.chain_length}; a tree "
                "takes the place of a chain and is verified greedily, so expected both 0"
            )

    def program(self, drafter: Drafter | None) -> Program:
        """
        Raises:
            InputError: see `Tree`; the drafter has no trees, or proposes fewer tokens at a time.
        """
        tree = Tree(self.tree) if self.tree else None
        if drafter is not None and tree is not None and not drafter.trees:
            raise InputError(f"tree: found widths {' '.join(map(str, self.tree))}, but this draft proposes no trees")
        if drafter is not None and drafter.most_tokens is not None and self.chain_length > drafter.most_tokens:
            raise InputError(
                f"chain length: found {self.chain_length}, but this draft proposes at most {drafter.most_tokens} "
                "tokens at a time"
            )
        return Program(drafter, self.chain_length, self.temperature > 0, self.top_p, tree)


def padded_length(longest: int) -> int:
    """Of prompts that are decoded together: few different lengths, each of which compiles once."""
    return max(8, 1 << (longest - 1).bit_length()) if longest <= PREFILL_CHUNK else round_up(longest, PREFILL_CHUNK)


class Decoding:
    """One batch of prompts on its way."""

    def __init__(
        self,
        target: Target,
        draft: ReadyDraft | None,
        prompts: Sequence[Sequence[int]],
        settings: Settings,
        *,
        seeds: Sequence[int] | None = None,
        num_rows: int | None = None,
        least_length: int = 0,
    ):
        """Reads the prompts and makes the first token of each answer.

        Args:
            draft: not looked at where nothing is drafted; beside the target (see `beside`).
            seeds: one for each row; their numbers by default. A row depends on its own prompt and seed alone.
            num_rows: of the compiled batch, the rest is padding; as many as there are prompts by default.
            least_length: to which prompts are padded at least, so that batches share a compiled program.

        Raises:
            InputError: a prompt is empty, or leaves with its answer the target's context; a node of the tree has more
                children than there are draft tokens.
        """
        self._settings, num = settings, len(prompts)
        context = target.config.context
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise InputError(f"prompts: number {i} is empty, expected at least one token")
            if len(prompt) + settings.max_new_tokens > context:
                raise InputError(
                    f"prompts: number {i} has {len(prompt)} tokens; with an answer of {settings.max_new_tokens} it "
                    f"leaves the target's context of {context}; shorten it, or lower max_new_tokens"
                )
        total = round_up(max(num_rows or 0, num), target.row_multiple)
        padded = padded_length(max(least_length, *map(len, prompts)))
        tokens_BP = np.zeros((total, padded), np.int32)
        lengths, limits, numbers = np.ones(total, np.int32), np.zeros(total, np.int32), np.zeros(total, np.uint32)
        for i, prompt in enumerate(prompts):
            tokens_BP[i, : len(prompt)] = prompt
        lengths[:num], limits[:num] = [len(prompt) for prompt in prompts], settings.max_new_tokens
        numbers[:num] = range(num) if seeds is None else seeds
        temperatures = np.full(total, settings.temperature or 1.0, np.float32)
        rows = Requests(lengths, limits, numbers, temperatures)
        alone = settings.chain_length == 0 and not settings.tree
        assert alone or draft is not None, "nothing to draft with"
        graphdef, state, drafter = (None, None, None) if alone or draft is None else draft
        program = settings.program(drafter)
        stops_N = np.asarray(settings.stop_tokens, np.int32)
        drafted = program.chain_length
        if program.tree is not None:
            assert draft is not None
            drafted, vocab_size = program.tree.num_nodes - 1, nnx.merge(*draft[:2]).config.draft_vocab_size
            if max(settings.tree) > vocab_size:
                raise InputError(
                    f"tree: found width {max(settings.tree)}, expected at most the draft's {vocab_size} tokens"
                )
        space = Space(padded + round_up(settings.max_new_tokens + drafted, 8), settings.max_new_tokens)
        prefill = dataclasses.replace(program, chain_length=min(program.depth, 1), tree=None)  # the same for all
        self._num, self._target = num, target
        with target.on_mesh():
            self._carry: Carry = begin(target, graphdef, state, prefill, tokens_BP, rows, stops_N, space)
        self._step = lambda num_passes, carry: advance(
            target, graphdef, state, program, rows, stops_N, np.int32(num_passes), carry
        )

    @property
    def num_tokens(self) -> int:
        """Made so far, the first of each answer included."""
        return int(jax.device_get(self._carry.num_answer_B).sum())

    @property
    def num_passes(self) -> int:
        """Of the target so far, added up over rows."""
        return int(jax.device_get(self._carry.num_pass_B).sum())

    def advance(self, num_passes: int = PASSES_AT_A_TIME) -> bool:
        """Up to so many target passes more; whether any row still runs."""
        with self._target.on_mesh():
            self._carry = self._step(num_passes, self._carry)
        return bool(jax.device_get(self._carry.running_B).any())

    def finish(self, on_passes: Callable[[int, int], None] = lambda num_passes, num_tokens: None) -> list[Decoded]:
        """Every answer to its end.

        Args:
            on_passes: called now and then with the target passes (of single rows) and the tokens since the last call.
        """
        running, passes, tokens = True, self.num_passes, self.num_tokens
        while running:
            running = self.advance()
            on_passes(self.num_passes - passes, self.num_tokens - tokens)
            passes, tokens = self.num_passes, self.num_tokens
        return self.answers()

    def answers(self) -> list[Decoded]:
        """As far as they are."""
        carry = self._carry
        answer_BM, yield_BM, made_B, passes_B = jax.device_get(
            (carry.answer_BM, carry.yield_BM, carry.num_answer_B, carry.num_pass_B)
        )
        return [
            Decoded(answer_BM[i, : made_B[i]].tolist(), yield_BM[i, : passes_B[i]].tolist()) for i in range(self._num)
        ]
