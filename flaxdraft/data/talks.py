"""Conversations that the target is to answer, and what becomes of each: one line of `conversations.jsonl`.

A line holds the messages, for people, and `input_ids` with `loss_mask`, the very tokens that the target read and
produced, for training. It stands once its conversation is complete: a stopped run goes on behind the last line, and
half a line is cut off. The callers see to the answers: a target that is loaded here (regenerate.py), or servers
(served_answers.py).
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flaxdraft.data.bad_rows import BadRows
from flaxdraft.data.chat_template import ChatTemplate
from flaxdraft.data.conversations import Conversation
from flaxdraft.data.prompts import render_messages
from flaxdraft.data.templates import ChatOptions, render
from flaxdraft.errors import InputError
from flaxdraft.progress import Bar

FILE = "conversations.jsonl"


@dataclasses.dataclass(frozen=True)
class Answering:
    """How the target answers; part of what a file of answers was made from."""

    max_prompt_tokens: int = 4096  # a turn whose prompt is longer ends its conversation before it
    max_new_tokens: int = 1024  # an answer that is not done by then ends its conversation
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Asking:
    """What turns questions into the prompts of a target, and ends its answers."""

    tokenizer: Any
    template: ChatTemplate
    stop_tokens: Sequence[int]
    options: Answering


@dataclasses.dataclass
class Talk:
    """A conversation that is being answered."""

    number: int  # in the file, from 0
    source: Conversation
    asked: list[list[dict[str, Any]]]  # what stands before each answer
    messages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    prompt: list[int] = dataclasses.field(default_factory=list)  # of the last turn
    answers: list[list[int]] = dataclasses.field(default_factory=list)
    ended: str = ""  # why nothing follows, where turns are left out

    @property
    def is_done(self) -> bool:
        return bool(self.ended) or len(self.answers) == len(self.asked)

    def next_prompt(self, asking: Asking) -> tuple[list[dict[str, Any]], list[int]] | None:
        """The messages before the next answer, and what the target reads of them; None where that is too long, which
        ends the conversation.

        Raises:
            InputError: the chat template refuses what the target answered.
        """
        messages, source = [*self.messages, *self.asked[len(self.answers)]], self.source
        prompt = render_messages(asking.tokenizer, messages, source.where, source.tools, asking.template)
        if len(prompt) > (limit := asking.options.max_prompt_tokens):
            self.ended = f"longer than {limit} tokens, ended before the turn that was"
            return None
        return messages, prompt

    def hear(self, messages: list[dict[str, Any]], prompt: list[int], answer: list[int], asking: Asking) -> None:
        """Takes the answer to `next_prompt`. One that is not done ends the conversation."""
        text = asking.tokenizer.decode(answer, skip_special_tokens=True)
        self.prompt = prompt
        self.answers.append(answer)
        self.messages = [*messages, {"role": "assistant", "content": text}]
        if answer[-1] not in asking.stop_tokens:
            self.ended = f"not done after {asking.options.max_new_tokens} tokens, ended there"

    def seed(self, seed: int) -> int:
        """Of the next turn: it depends on nothing else that is answered, nor on where a run was stopped."""
        return int(np.random.SeedSequence((seed, self.number, len(self.answers))).generate_state(1)[0])

    def line(self, asking: Asking) -> bytes:
        """What is written of it."""
        row = {
            "id": self.source.id, "category": self.source.category, "split": self.source.split,
            "messages": self.messages, "input_ids": [int(token) for token in (*self.prompt, *self.answers[-1])],
            "loss_mask": earlier_mask(self, asking) + [1] * len(self.answers[-1]),
        }  # fmt: skip
        return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")


class Results:
    """Where talks go when they are done: into the file, the counts and the bar."""

    def __init__(self, asking: Asking, counts: Counter[str], progress: Bar, file: BinaryIO | None):
        """
        Args:
            counts: those of `to_answer`, which go on from there.
            file: where the lines are appended; None in a process that writes none.
        """
        self._asking, self._counts, self._progress, self._file = asking, counts, progress, file
        self._tokens, self._start = 0, time.monotonic()

    def take(self, talk: Talk) -> None:
        if talk.answers:
            self._counts["answered"] += 1
            self._tokens += sum(map(len, talk.answers))
            if self._file is not None:
                self._file.write(talk.line(self._asking))
                self._file.flush()
        if talk.ended:
            self._counts[talk.ended] += 1
        self._advance()

    def leave_out(self, why: str) -> None:
        """Counts a talk that is not done, and gets no line."""
        self._counts[why] += 1
        self._advance()

    def sync(self) -> None:
        """Sees to it that all lines are on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def _advance(self) -> None:
        self._progress.advance(1, f"{self._tokens / (time.monotonic() - self._start):.0f} tokens/s")


def answerable(
    conversations: Iterable[Conversation], tokenizer: Any, template: ChatTemplate, bad: BadRows
) -> list[Conversation]:  # fmt: skip
    """The conversations that can be asked, which is seen before anything is loaded.

    Args:
        bad: is given the others.
    """
    found: dict[str, Conversation] = {}
    for conversation in conversations:
        try:
            if conversation.tokens is not None:
                raise InputError(f"{conversation.where}: is tokenised already; the target can only answer messages")
            if (other := found.get(conversation.id)) is not None:
                raise InputError(f"{conversation.where}: id {conversation.id!r} stands in {other.where} already")
            _ask_all(conversation, tokenizer, template)
        except InputError as error:
            bad.add(error)
        else:
            found[conversation.id] = conversation
    return [*found.values()]


def _ask_all(conversation: Conversation, tokenizer: Any, template: ChatTemplate) -> None:
    """Renders every turn's prompt, with a placeholder for the answers that the target has yet to give.

    Raises:
        InputError: the chat template refuses one.
    """
    messages: list[dict[str, Any]] = []
    for asked in () if _has_tool_calls(conversation) else _questions(conversation):
        messages += asked
        render_messages(tokenizer, messages, conversation.where, conversation.tools, template)
        messages.append({"role": "assistant", "content": "yes"})


def _has_tool_calls(conversation: Conversation) -> bool:
    """Whether tools are called. Such conversations are left out: the tools' results would not be those of the target's
    calls."""
    return any(message["role"] == "tool" or message.get("tool_calls") for message in conversation.messages)


def _questions(conversation: Conversation) -> list[list[dict[str, Any]]]:
    """The messages between the assistant's turns; each run of them gets an answer."""
    runs: list[list[dict[str, Any]]] = [[]]
    for message in conversation.messages:
        if message["role"] == "assistant":
            runs.append([])
        else:
            runs[-1].append(message)
    return [run for run in runs if run]


def to_answer(conversations: Iterable[Conversation], done: set[str]) -> tuple[list[Talk], Counter[str]]:
    """What is left to answer, and how many conversations are `answered`, and how many left out for each reason.

    Args:
        done: ids of those that the file holds.
    """
    counts, talks = Counter(answered=len(done)), []
    for number, conversation in enumerate(conversations):
        if _has_tool_calls(conversation):
            counts["with tool calls, left out"] += 1
        elif not (asked := _questions(conversation)):
            counts["without a question, left out"] += 1
        elif conversation.id not in done:
            talks.append(Talk(number, conversation, asked))
    return talks, counts


def finished(path: Path) -> set[str]:
    """Ids of the complete lines; what follows the last of them is cut off."""
    if not path.exists():
        return set()
    with path.open("rb+") as file:
        text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        file.truncate(len(whole))
    return {json.loads(line)["id"] for line in whole.splitlines()}


def earlier_mask(talk: Talk, asking: Asking) -> list[int]:
    """The mask of the last prompt: 1 where an earlier answer stands there just as the target produced it. Templates
    that rewrite earlier turns (thinking models drop their reasoning), and texts that are tokenised otherwise when they
    are read again, leave nothing of such a turn to learn from."""
    mask = np.zeros(len(talk.prompt), np.int64)
    if len(talk.answers) > 1:
        context = dataclasses.replace(talk.source, messages=tuple(talk.messages[:-1]))
        try:
            options = ChatOptions(len(mask), template=asking.template, stop_tokens=asking.stop_tokens)
            rendered = render(asking.tokenizer, context, options)
        except InputError:
            return mask.tolist()
        edges = np.flatnonzero(np.diff(np.concatenate([[0], rendered.assistant, [0]])))
        spans = edges.reshape(-1, 2)
        for (start, stop), answer in zip(spans, talk.answers[:-1], strict=False):
            if talk.prompt[start:stop] == answer:
                mask[start:stop] = 1
    return mask.tolist()
