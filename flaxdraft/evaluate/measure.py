"""Prompts decoded with and without the draft, batch by batch, on one clock; finished batches are kept on disk.

Every batch is decoded by the target alone and by each chain and tree, one after the other, so that a machine that gets
slower is slower for all of them. What has to be compiled is compiled on a first run of a single pass, which is not
timed.

Of many processes all decode, and the first one keeps what was decoded.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxdraft.data.chat_template import ChatTemplate
from flaxdraft.data.prompts import Prompt, check_context, render_messages
from flaxdraft.decode.decoding import Decoded, Decoding, ReadyDraft, Settings, beside, padded_length
from flaxdraft.decode.tree import Tree
from flaxdraft.devices import hosts
from flaxdraft.evaluate.loading import PairedDraft
from flaxdraft.progress import Bar, bar
from flaxdraft.stages.claims import Stage
from flaxdraft.targets.decoder import DecoderTarget

LEAST_LENGTH = 128  # of padded prompts


@dataclasses.dataclass(frozen=True)
class Turn:
    """One answer."""

    question: str  # id of the prompt
    turn: int
    prompt: list[int]
    answer: Decoded


@dataclasses.dataclass(frozen=True)
class Timing:
    """Of a batch: seconds, and what was made in them."""

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decoded_tokens: int = 0  # the first token of each answer comes with the prefill

    def __add__(self, other: Timing) -> Timing:
        return Timing(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclasses.dataclass(frozen=True)
class Guess:
    """What is drafted for each target pass: a chain, a tree, or nothing."""

    chain_length: int = 0
    tree: tuple[int, ...] = ()  # as in `Settings`

    @property
    def depth(self) -> int:
        """The most draft tokens that a target pass accepts."""
        return len(self.tree) or self.chain_length

    @property
    def num_tokens(self) -> int:
        """Drafted, and verified, by each target pass."""
        return Tree(self.tree).num_nodes - 1 if self.tree else self.chain_length

    def __str__(self) -> str:
        if self.tree:
            return f"tree of {' '.join(map(str, self.tree))}"
        return f"chain of {self.chain_length}" if self.chain_length else "target alone"


@dataclasses.dataclass(frozen=True)
class Measured:
    """Everything decoded with one guess and seed."""

    guess: Guess
    seed: int
    turns: list[Turn]
    timing: Timing


@dataclasses.dataclass(frozen=True, eq=False)
class Session:
    """What decodes, and how."""

    target: DecoderTarget
    draft: PairedDraft
    tokenizer: Any
    settings: Settings  # its chain or tree is replaced by each in turn
    limit_field: str  # what `settings.max_new_tokens` is called where the user gave it
    num_rows: int  # conversations decoded together
    template: ChatTemplate = dataclasses.field(default_factory=ChatTemplate)

    @functools.cached_property
    def ready(self) -> ReadyDraft:
        """The draft where it decodes."""
        return beside(self.target, self.draft.ready)

    def render(self, prompt: Prompt, messages: Sequence[dict[str, str]]) -> list[int]:
        """
        Raises:
            InputError: the chat template refuses the conversation, or with an answer it leaves the target's context.
        """
        tokens = render_messages(self.tokenizer, messages, f"prompt {prompt.id!r}", template=self.template)
        turn = f"turn {len(messages) // 2 + 1} of prompt {prompt.id!r}"
        context = self.target.config.context
        check_context(len(tokens), turn, self.settings.max_new_tokens, self.limit_field, context)
        return tokens


def _seed(seed: int, prompt: Prompt, turn: int) -> int:
    words = (seed, turn, *prompt.id.encode("utf-8"))
    return int(np.random.SeedSequence(words).generate_state(1)[0])


class Clock:
    """Decodes batches and times them, whatever is compiled for the first time left out."""

    def __init__(self, session: Session):
        self._session, self._warm = session, set()

    def decode(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], settings: Settings, on_tokens: Callable
    ) -> tuple[list[Decoded], Timing]:
        s = self._session
        start_one = lambda: Decoding(  # noqa: E731
            s.target, s.ready, prompts, settings, seeds=seeds, num_rows=s.num_rows, least_length=LEAST_LENGTH
        )
        shape = settings.chain_length, settings.tree, padded_length(max(LEAST_LENGTH, *map(len, prompts)))
        if shape not in self._warm:
            start_one().advance(1)
            self._warm.add(shape)
        start = time.monotonic()
        decoding = start_one()
        first = made = decoding.num_tokens  # waits for the prefill
        prefilled, running = time.monotonic(), True
        while running:
            running = decoding.advance()
            before, made = made, decoding.num_tokens
            on_tokens(made - before)
        return decoding.answers(), Timing(prefilled - start, time.monotonic() - prefilled, made - first)


def _decode_batch(session: Session, clock: Clock, batch: Sequence[Prompt], settings: Settings, seed: int, on_tokens):
    """Every turn of some conversations, those at the same turn together; answers go into the prompts behind them."""
    turns, timing = [], Timing()
    messages: list[list[dict[str, str]]] = [[] for _ in batch]
    for turn in range(max(len(prompt.turns) for prompt in batch)):
        here = [i for i, prompt in enumerate(batch) if turn < len(prompt.turns)]
        for i in here:
            messages[i].append({"role": "user", "content": batch[i].turns[turn]})
        prompts = [session.render(batch[i], messages[i]) for i in here]
        seeds = [_seed(seed, batch[i], turn) for i in here]
        answers, took = clock.decode(prompts, seeds, settings, on_tokens)
        timing += took
        for i, prompt, answer in zip(here, prompts, answers, strict=True):
            turns.append(Turn(batch[i].id, turn, prompt, answer))
            text = session.tokenizer.decode(answer.tokens, skip_special_tokens=True)
            messages[i].append({"role": "assistant", "content": text})
    return turns, timing


def _pack(turns: Sequence[Turn], timing: Timing) -> dict[str, Any]:
    return {"turns": [dataclasses.asdict(turn) for turn in turns], "timing": dataclasses.asdict(timing)}


def _unpack(stored: dict[str, Any]) -> tuple[list[Turn], Timing]:
    turns = [Turn(**turn | {"answer": Decoded(**turn["answer"])}) for turn in stored["turns"]]
    return turns, Timing(**stored["timing"])


def _batches(session: Session, prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """By length, so that rows decoded together are padded little.

    Raises:
        InputError: see `Session.render`; every first turn is looked at before anything is decoded.
    """
    length = {prompt.id: len(session.render(prompt, prompt.first)) for prompt in prompts}
    order = sorted(prompts, key=lambda prompt: (length[prompt.id], prompt.id))
    return [order[at : at + session.num_rows] for at in range(0, len(order), session.num_rows)]


def measure(
    session: Session, prompts: Sequence[Prompt], guesses: Sequence[Guess], seeds: Sequence[int], directory: Path,
    inputs: dict[str, Any],
) -> list[Measured]:  # fmt: skip
    """The target alone, then each guess, for each seed.

    Args:
        directory: where finished batches are kept.
        inputs: what a batch depends on; a batch from other inputs is decoded anew.
    """
    batches, clock = _batches(session, prompts), Clock(session)
    cases = [(guess, seed) for seed in seeds for guess in (Guess(), *guesses)]
    found: dict[tuple[Guess, int], list] = {case: [] for case in cases}
    stages = {(i, *case): _stage(directory, inputs, i, *case) for i in range(len(batches)) for case in cases}
    stored = dict(zip(stages, hosts.agree([stage.load() for stage in stages.values()]), strict=True))
    done = sum(result is not None for result in stored.values())
    with bar("batches", len(stages), done) as progress:
        for (i, guess, seed), stage in stages.items():
            result = stored[i, guess, seed]
            if result is None:
                result = _pack(*_watched(session, clock, batches[i], guess, seed, progress))
                if hosts.is_main():
                    stage.store(result)
            found[guess, seed].append(_unpack(result))
    return [_joined(guess, seed, parts) for (guess, seed), parts in found.items()]


def _stage(directory: Path, inputs: dict[str, Any], i: int, guess: Guess, seed: int) -> Stage:
    drafted = "-".join(map(str, guess.tree)) or guess.chain_length
    kind = "tree" if guess.tree else "chain"
    return Stage(directory / f"{kind}{drafted}-seed{seed}-{i:05d}.json", inputs | {"part": [i, drafted, seed]})


def _watched(session: Session, clock: Clock, batch, guess: Guess, seed: int, progress: Bar):
    settings = dataclasses.replace(session.settings, chain_length=guess.chain_length, tree=guess.tree)
    expected = settings.max_new_tokens * sum(len(prompt.turns) for prompt in batch)
    before, made = progress.done, 0

    def on_tokens(num):
        nonlocal made
        made += num
        progress.advance(num / expected, f"{guess}, {made} tokens")

    turns, timing = _decode_batch(session, clock, batch, settings, seed, on_tokens)
    progress.advance(
        before + 1 - progress.done, f"{guess}, {timing.decoded_tokens / timing.decode_seconds:.1f} tokens/s"
    )
    return turns, timing


def _joined(guess: Guess, seed: int, parts: Sequence[tuple[list[Turn], Timing]]) -> Measured:
    turns = [turn for part, _ in parts for turn in part]
    return Measured(guess, seed, turns, sum((timing for _, timing in parts), Timing()))


def texts_of(measured: Measured) -> list[tuple[list[int], int]]:
    """Tokens of each prompt with its answer, and how many of them are the prompt's."""
    return [([*turn.prompt, *turn.answer.tokens], len(turn.prompt)) for turn in measured.turns]
