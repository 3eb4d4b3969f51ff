"""The target answers conversations itself: every assistant turn of a file is replaced by the target's own.

A draft agrees with its target most where it has learned from what the target says, so this is what to train on. Each
conversation becomes one line of `conversations.jsonl`: its messages, for people, and `input_ids` with `loss_mask`, the
very tokens that the target read and produced, for training. A line stands once it is complete: a stopped run goes on
behind the last one, and half a line is cut off. Of many processes all answer, and the first one writes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flaxdraft.data.bad_rows import BadRows
from flaxdraft.data.chat_template import ChatTemplate
from flaxdraft.data.conversations import Conversation
from flaxdraft.data.prompts import render_messages
from flaxdraft.data.templates import ChatOptions, render
from flaxdraft.decode.generation import Writing, generate_each
from flaxdraft.devices import hosts
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Target
from flaxdraft.progress import bar

FILE = "conversations.jsonl"
# Times the rows: conversations of one turn that share rows. Longer ones are answered by rows alone, first turns first:
# none of a group is done, and on disk, before its last turn.
GROUP = 8


@dataclasses.dataclass(frozen=True)
class Answering:
    """How the target answers; part of what a file of answers was made from."""

    max_prompt_tokens: int = 4096  # a turn whose prompt is longer ends its conversation before it
    max_new_tokens: int = 1024  # an answer that is not done by then ends its conversation
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclasses.dataclass
class _Talk:
    """A conversation that is being answered."""

    number: int  # in the file, from 0
    source: Conversation
    asked: list[list[dict[str, Any]]]  # what stands before each answer
    messages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    prompt: list[int] = dataclasses.field(default_factory=list)  # of the last turn
    answers: list[list[int]] = dataclasses.field(default_factory=list)
    ended: str = ""  # why nothing follows, where turns are left out


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


def regenerate(
    directory: Path,
    conversations: Iterable[Conversation],
    target: Target,
    tokenizer: Any,
    stop_tokens: Sequence[int],
    options: Answering,
    num_rows: int,
    template: ChatTemplate | None = None,
) -> Counter[str]:
    """Answers what the file does not hold yet; returns how many conversations were `answered`, and of those that were
    not, or not to their end, how many for each reason.

    Each answer depends on its conversation and the seed alone, not on those beside it or on where a run was stopped.

    Args:
        conversations: those that are `answerable`.
        num_rows: conversations answered together.
        template: what the chat template is given besides.

    Raises:
        InputError: the chat template refuses what the target answered.
    """
    path, counts, template = directory / FILE, Counter(), template or ChatTemplate()
    done = set(hosts.agree(sorted(_finished(path)) if hosts.is_main() else None))
    talks = []
    for number, conversation in enumerate(conversations):
        if _has_tool_calls(conversation):
            counts["with tool calls, left out"] += 1
        elif asked := _questions(conversation):
            talks.append(_Talk(number, conversation, asked))
        else:
            counts["without a question, left out"] += 1
    counts["answered"] = len(done)
    left = [talk for talk in talks if talk.source.id not in done]
    num_rows = min(num_rows, max(len(left), 1))
    # By length, so that rows decoded together are padded little.
    left.sort(key=lambda talk: (sum(len(message["content"]) for message in talk.asked[0]), talk.number))
    with bar("conversations", len(talks), len(talks) - len(left)) as progress, _appended(path) as file:
        made, start = 0, time.monotonic()
        size = num_rows * (GROUP if all(len(talk.asked) == 1 for talk in left) else 1)
        for at in range(0, len(left), size):
            group = left[at : at + size]
            for talk in _answered(group, target, tokenizer, stop_tokens, options, num_rows, template):
                if talk.answers:
                    counts["answered"] += 1
                    made += sum(map(len, talk.answers))
                    if file is not None:
                        line = json.dumps(_row(talk, tokenizer, template, stop_tokens), ensure_ascii=False) + "\n"
                        file.write(line.encode("utf-8"))
                        file.flush()
                if talk.ended:
                    counts[talk.ended] += 1
                progress.advance(1, f"{made / (time.monotonic() - start):.0f} tokens/s")
            if file is not None:
                os.fsync(file.fileno())
    return counts


def _appended(path: Path) -> AbstractContextManager[BinaryIO | None]:
    """Opens the file to append, in the first process alone."""
    return path.open("ab") if hosts.is_main() else nullcontext()


def _finished(path: Path) -> set[str]:
    """Ids of the complete lines; what follows the last of them is cut off."""
    if not path.exists():
        return set()
    with path.open("rb+") as file:
        text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        file.truncate(len(whole))
    return {json.loads(line)["id"] for line in whole.splitlines()}


def _questions(conversation: Conversation) -> list[list[dict[str, Any]]]:
    """The messages between the assistant's turns; each run of them gets an answer."""
    runs: list[list[dict[str, Any]]] = [[]]
    for message in conversation.messages:
        if message["role"] == "assistant":
            runs.append([])
        else:
            runs[-1].append(message)
    return [run for run in runs if run]


def _answered(
    group: list[_Talk], target: Target, tokenizer: Any, stop_tokens: Sequence[int], options: Answering, num_rows: int,
    template: ChatTemplate,
) -> Iterator[_Talk]:  # fmt: skip
    """Conversations as they come to their end, their turns answered: first turns first, then second ones."""
    how = Writing(options.max_new_tokens, stop_tokens, options.temperature, options.top_p)
    for turn in range(max(len(talk.asked) for talk in group)):
        here = []
        for talk in group:
            if talk.ended or turn >= len(talk.asked):
                continue
            messages = [*talk.messages, *talk.asked[turn]]
            prompt = render_messages(tokenizer, messages, talk.source.where, talk.source.tools, template)
            if len(prompt) > options.max_prompt_tokens:
                talk.ended = f"longer than {options.max_prompt_tokens} tokens, ended before the turn that was"
                yield talk
                continue
            talk.messages, talk.prompt = messages, prompt
            here.append(talk)
        if not here:
            return
        prompts, seeds = [talk.prompt for talk in here], [_seed(options.seed, talk.number, turn) for talk in here]
        for number, answer, _ in generate_each(target, prompts, how, seeds=seeds, num_rows=num_rows):
            talk = here[number]
            talk.answers.append(answer)
            text = tokenizer.decode(answer, skip_special_tokens=True)
            talk.messages = [*talk.messages, {"role": "assistant", "content": text}]
            if answer[-1] not in stop_tokens:
                talk.ended = f"not done after {options.max_new_tokens} tokens, ended there"
            if talk.ended or turn + 1 == len(talk.asked):
                yield talk


def _seed(seed: int, number: int, turn: int) -> int:
    return int(np.random.SeedSequence((seed, number, turn)).generate_state(1)[0])


def _row(talk: _Talk, tokenizer: Any, template: ChatTemplate, stop_tokens: Sequence[int]) -> dict[str, Any]:
    tokens = [*talk.prompt, *talk.answers[-1]]
    mask = _earlier(talk, tokenizer, template, stop_tokens) + [1] * len(talk.answers[-1])
    return {
        "id": talk.source.id, "category": talk.source.category, "split": talk.source.split, "messages": talk.messages,
        "input_ids": [int(token) for token in tokens], "loss_mask": mask,
    }  # fmt: skip


def _earlier(talk: _Talk, tokenizer: Any, template: ChatTemplate, stop_tokens: Sequence[int]) -> list[int]:
    """The mask of the last prompt: 1 where an earlier answer stands there just as the target produced it. Templates
    that rewrite earlier turns (thinking models drop their reasoning), and texts that are tokenised otherwise when they
    are read again, leave nothing of such a turn to learn from."""
    mask = np.zeros(len(talk.prompt), np.int64)
    if len(talk.answers) > 1:
        context = dataclasses.replace(talk.source, messages=tuple(talk.messages[:-1]))
        try:
            options = ChatOptions(len(mask), template=template, stop_tokens=stop_tokens)
            rendered = render(tokenizer, context, options)
        except InputError:
            return mask.tolist()
        edges = np.flatnonzero(np.diff(np.concatenate([[0], rendered.assistant, [0]])))
        spans = edges.reshape(-1, 2)
        for (start, stop), answer in zip(spans, talk.answers[:-1], strict=False):
            if talk.prompt[start:stop] == answer:
                mask[start:stop] = 1
    return mask.tolist()
