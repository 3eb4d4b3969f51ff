"""What a chat template writes around every turn of the assistant, as short conversations show."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from flaxdraft.data.chat import Chat
from flaxdraft.data.chat_template import ChatTemplate
from flaxdraft.errors import InputError

PROBES = "Q", "Z"  # contents that begin differently


def habits_of(chat: Chat) -> Habits:
    """The habits of the template that the conversation takes: conversations with tools may have one of their own, which
    is then asked without any tools."""
    several = isinstance(chat.tokenizer.chat_template, dict)
    return _habits(chat.tokenizer, chat.template, several and chat.tools is not None)


class Habits(NamedTuple):
    """What a template writes around every turn of the assistant, as a short conversation shows."""

    prompt: str  # that asks for an answer
    lead: str  # between the prompt and the content
    end: str | None  # that ends a turn, without white space behind it; None where the short conversation is refused
    unasked: bool = False  # whether the prompt is written behind whatever is no answer, without being asked for


@functools.lru_cache(maxsize=16)
def _habits(tokenizer: Any, template: ChatTemplate, with_tools: bool) -> Habits:
    asked, answers = {"role": "user", "content": "?"}, [{"role": "assistant", "content": probe} for probe in PROBES]
    chat = Chat(tokenizer, template, "", (), () if with_tools else None)
    try:
        plain, prompted = chat.text([asked]), chat.text([asked], prompt=True)
        one, two = (chat.text([asked, answer]) for answer in answers)
    except InputError:
        return Habits("", "", None)
    at = len(shared(one, two))
    end = one[at + 1 :].rstrip()
    footer = _footer(tokenizer, end)
    if not prompted.startswith(plain):
        plain = _without(footer, plain)
    prompt = prompted[len(plain) :] if prompted.startswith(plain) else ""
    lead = one[len(prompted) : at] if one.startswith(prompted) else ""
    header = "" if prompt else _header(chat, asked, answers, footer).removesuffix(lead)
    unasked = bool(header) and plain.endswith(header)
    return Habits(header if unasked else prompt, lead, end, unasked)


def _footer(tokenizer: Any, end: str) -> str:
    """The token that ends a text, which some templates write behind the end of its last turn."""
    footer = max((token for token in tokenizer.get_added_vocab() if end.endswith(token)), key=len, default="")
    return footer if end.removesuffix(footer).strip() else ""


def _without(footer: str, text: str) -> str:
    return text.rstrip().removesuffix(footer) if footer and text.rstrip().endswith(footer) else text


def _header(chat: Chat, asked: dict[str, Any], answers: Sequence[dict[str, Any]], footer: str) -> str:
    """What stands before the second of two answers in a row."""
    try:
        before, one, two = (chat.text([asked, answers[0], *more]) for more in ((), answers[:1], answers[1:]))
    except InputError:
        return ""
    both = shared(one, two)
    if not both.startswith(before):
        before = _without(footer, before)
    return both.removeprefix(before) if both.startswith(before) else ""


def shared(one: str, other: str) -> str:
    """The beginning that both texts have in common."""
    return one[
        : next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    ]
