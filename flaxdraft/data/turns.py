"""Which part of a rendered conversation the target would have written: the characters of each assistant turn.

A turn begins where the conversation up to it, with the generation prompt, ends, and ends where the conversation with it
ends, without the white space that the template writes behind its end of turn. That needs a template whose prefixes stay
as they are when messages follow. Nothing stands before a first turn of the assistant; it begins behind the generation
prompt that the template writes before its content. Some templates refuse a prefix (no user has spoken yet) of what they
take whole; there a turn is what changes when its content does, and the end of turn behind it.

{% generation %} marks say which turns are the assistant's where prefixes do not, and which of them to learn from. They
often take in a header or a newline that no target writes, or leave out the end of turn, which it does write: what of a
marked turn is supervised is what its prefixes say. Where they say nothing, or the template writes no generation prompt,
the mark decides, with the end of turn behind it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from flaxdraft.data.chat import Chat, Refused, Span
from flaxdraft.data.reasoning import CLOSE, OPEN
from flaxdraft.data.template_habits import PROBES, habits_of, shared
from flaxdraft.errors import InputError

_SHOWN = 160  # characters of a rendering in a message


def turns(chat: Chat, text: str, last_only: bool) -> list[Span]:
    """The spans of what the assistant wrote in the rendered conversation.

    Args:
        last_only: the last of them alone.

    Raises:
        InputError: the template is not prefix-stable and has no marks (both renderings are shown).
    """
    numbers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    found, unstable, marks = [], None, chat.marks()
    if marks is not None:
        marks = [(begin, end) for begin, end in (_widened(chat, text, mark) for mark in marks) if begin < end]
    for i in numbers[-1:] if last_only else numbers:
        try:
            found.append(_by_prefixes(chat, text, i, last_only))
        except Refused:
            try:
                found.append(_by_content(chat, text, i))
            except InputError as error:
                unstable = unstable or error
        except InputError as error:
            unstable = unstable or error
    if marks is None:
        if unstable is not None:
            raise unstable
        return found
    if last_only and not found:
        return [_trimmed(chat, text, span) for span in marks[-1:]]
    return [span for mark in marks for span in _of_mark(chat, text, mark, found, trim=not last_only)]


def _of_mark(chat: Chat, text: str, mark: Span, found: Sequence[Span], trim: bool) -> list[Span]:
    """What a mark makes supervised: the turns that prefixes found and the mark touches. Where the template writes no
    generation prompt, prefixes take a header for the target's, and only the marked part of these turns counts. Where
    prefixes found no turn there, it is the mark itself, trimmed if that is wanted."""
    touched = [(begin, end) for begin, end in found if max(begin, mark[0]) < min(end, mark[1])]
    if touched and not habits_of(chat).prompt:
        return [(max(begin, mark[0]), min(end, mark[1])) for begin, end in touched]
    return touched or ([_trimmed(chat, text, mark)] if trim else [])


def _by_prefixes(chat: Chat, text: str, i: int, last_only: bool) -> Span:
    begin, is_last = _begin(chat, text, i), i + 1 == len(chat.messages)
    after = _without_footer(chat, text if is_last else chat.text(chat.messages[: i + 1]))
    if not text.startswith(after):
        raise InputError(_unstable(chat, i, "up to and with", after, text, last_only))
    return begin, max(_end(chat, text, begin, len(after)), begin)


def _by_content(chat: Chat, text: str, i: int) -> Span:
    """The span of message `i` where the template refuses the messages up to it: the part of the whole text that changes
    when its content does, and the end of turn behind it."""
    silent = {key: value for key, value in chat.messages[i].items() if key != "tool_calls"}
    messages = [*chat.messages[:i], silent, *chat.messages[i + 1 :]]
    one, two = (chat.text(_with_content(messages, i, probe)) for probe in PROBES)
    before, behind = _until_answer(chat, shared(one, two)), shared(one[::-1], two[::-1])[::-1]
    end = len(text) - len(behind)
    if not text.startswith(before) or not text.endswith(behind) or end < len(before):
        raise InputError(_unstable(chat, i, "before", before, text, False))
    return len(before), _with_marker(chat, text, end)


def _with_content(messages: Sequence[dict[str, Any]], i: int, content: str) -> list[dict[str, Any]]:
    return [*messages[:i], {**messages[i], "content": content}, *messages[i + 1 :]]


def _widened(chat: Chat, text: str, mark: Span) -> Span:
    """Extends a mark to what the target writes around the content: what stands between the generation prompt and it
    (white space alone, where there is no such prompt), and the end of turn."""
    (begin, end), habits = mark, habits_of(chat)
    if (habits.prompt or not habits.lead.strip()) and text[:begin].endswith(habits.prompt + habits.lead):
        begin -= len(habits.lead)
    return begin, _with_marker(chat, text, end)


def _with_marker(chat: Chat, text: str, end: int) -> int:
    """Moves the end of a span behind the end of turn, where one stands there."""
    marker = _marker(chat)
    return end + len(marker) if marker and text.startswith(marker, end) else end


def _begin(chat: Chat, text: str, i: int) -> int:
    before = None
    if i:
        with contextlib.suppress(InputError):  # some want a user's message last where they are to ask for an answer
            before = chat.text(chat.messages[:i], prompt=True)
    if before is None:
        before = _until_content(chat, i)
    if not text.startswith(before):
        raise InputError(_unstable(chat, i, "before", before, text, False))
    (prompt, *_, unasked), begin = habits_of(chat), len(before)
    if unasked and not before.endswith(prompt) and text.startswith(prompt, begin):
        begin += len(prompt)
    return begin


def _until_content(chat: Chat, i: int) -> str:
    """What the template writes before message `i`, up to the generation prompt that stands before its content."""
    probes = [_with_content(chat.messages[: i + 1], i, probe) for probe in PROBES]
    return _until_answer(chat, shared(*(chat.text(probe) for probe in probes)))


def _until_answer(chat: Chat, before_content: str) -> str:
    """What stands before an answer, the generation prompt with it.

    Args:
        before_content: what the template writes before the content.
    """
    habits, marker = habits_of(chat), _marker(chat)
    if not habits.prompt:
        return before_content.removesuffix(habits.lead)
    before, prompt, lead = before_content.rpartition(habits.prompt)
    if not prompt or (marker and marker in lead):  # an earlier turn's
        return before_content + habits.prompt  # which is no prefix
    return before + prompt


def _marker(chat: Chat) -> str | None:
    """What ends every turn, up to the first token behind which the target would write nothing."""
    marker = habits_of(chat).end
    ends = [marker.find(stop) + len(stop) for stop in chat.stops if stop in marker] if marker else ()
    return marker[: min(ends, default=len(marker))] if marker else marker


def _without_footer(chat: Chat, text: str) -> str:
    """Cuts off the end of text that some templates write behind the last turn, wherever that is."""
    whole, marker = habits_of(chat).end, _marker(chat)
    kept = text.rstrip()
    if not whole or not marker or whole == marker or not kept.endswith(whole):
        return text
    return kept.removesuffix(whole) + marker


def _end(chat: Chat, text: str, begin: int, end: int) -> int:
    """Where a turn ends: behind its end of turn, before what the template writes after that."""
    marker = _marker(chat)
    if marker == "":  # white space alone ends a turn, or nothing does; some end a turn where another follows
        stop = next((stop for stop in chat.stops if text.startswith(stop, end)), "")
        return end if text[begin:end].endswith(chat.stops) else end + len(stop)
    kept = text[begin:end].rstrip()
    markers = [*chat.tokenizer.get_added_vocab(), *([marker] if marker else ())]
    return begin + len(kept) if any(kept.endswith(one) for one in markers) else end


def _trimmed(chat: Chat, text: str, span: Span) -> Span:
    """Takes off a mark what it holds of the generation prompt, and of the white space behind the end of turn."""
    begin, end = span
    prompt = habits_of(chat).prompt
    sizes = [
        _whole_tokens(chat, prompt[at:], shared(prompt[at:], text[begin:end]))
        for at in range(len(prompt)) if text[:begin].endswith(prompt[:at])
    ]  # fmt: skip
    begin += max(sizes, default=0)
    return begin, _end(chat, text, begin, end)


def _whole_tokens(chat: Chat, prompt: str, found: str) -> int:
    """How much of the rest of a generation prompt stands there: all of it, or up to the end of an added token. An
    answer may by chance begin like it."""
    if found == prompt:
        return len(found)
    ends = [found.rfind(token) + len(token) for token in chat.tokenizer.get_added_vocab() if token in found]
    return max(ends, default=0)


def _unstable(chat: Chat, turn: int, what: str, prefix: str, text: str, last_only: bool) -> str:
    at = len(shared(prefix, text))
    near = slice(max(at - _SHOWN // 2, 0), at + _SHOWN // 2)
    said = (
        f"{chat.where}: the chat template is not prefix-stable: {what} message {turn} it renders\n"
        f"    ...{prefix[near]!r}\n  but the whole conversation there reads\n    ...{text[near]!r}\n"
        "  so what the assistant produced cannot be told. "
    )
    answer = "let the target answer the file itself (python -m flaxdraft.data regenerate), which keeps its tokens"
    tail = prefix[-_SHOWN:]
    if what == "before" and tail.rfind(OPEN) > tail.rfind(CLOSE):
        return (
            f"{said}The generation prompt opens {OPEN}, and finished turns are written without it. {answer[0].upper()}"
            f"{answer[1:]}, or give a template with {{% generation %}} marks"
        )
    last = max(i for i, message in enumerate(chat.messages) if message["role"] == "assistant")
    if last_only or turn == last:
        return f"{said}{answer[0].upper()}{answer[1:]}, or give a template with {{% generation %}} marks"
    return (
        f"{said}Train on the last turn alone (data.last_turn_only=true, --last-turn-only), {answer}, or give a "
        "template with {% generation %} marks"
    )
