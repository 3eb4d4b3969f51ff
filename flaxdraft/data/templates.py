"""From a conversation to tokens and the mask of what the assistant produced, by the tokenizer's own chat template.

Where the template marks what is generated ({% generation %}), the marks decide. Elsewhere each assistant turn is found
by rendering prefixes: it begins where the conversation up to it, with the generation prompt, ends, and ends where the
conversation with it ends. That needs a template whose prefixes stay as they are when messages follow; one that rewrites
earlier turns (thinking models drop their reasoning) is refused, for then no row could show what was produced in them.
A turn's end-of-turn token belongs to it; what the template writes after that does not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from jinja2.exceptions import SecurityError, TemplateError

from flaxdraft.data.conversations import Conversation
from flaxdraft.errors import InputError

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REASONING = re.compile(r"<think>.*?</think>", re.DOTALL)
_SHOWN = 160  # characters of a rendering in a message


@dataclasses.dataclass(frozen=True)
class Rendered:
    """One conversation as the target reads it."""

    tokens: np.ndarray  # int32 [L]
    assistant: np.ndarray  # bool [L], true where the assistant produced the token


class Masked(Protocol):
    """Tokens, and which of them are supervised: what every row has, before the target has read it and after."""

    @property
    def tokens(self) -> np.ndarray: ...
    @property
    def assistant(self) -> np.ndarray: ...


def rows_digest(rows: Iterable[Masked]) -> str:
    """Of tokens and masks: of what a target is asked, and what of it is supervised."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.tokens.tobytes() + row.assistant.tobytes() + b"|")
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    max_length: int
    last_turn_only: bool = False  # supervise the last assistant turn alone
    mask_reasoning: bool = False  # do not supervise what stands between <think> and </think>


def render(tokenizer: Any, conversation: Conversation, options: ChatOptions) -> Rendered:
    """Tokens and mask, cut at `max_length`.

    Raises:
        InputError: the template refuses the conversation, leaves its tools out, or is not prefix-stable (row and both
            renderings are shown); a tokenised row has ids that the tokenizer has not.
    """
    if conversation.tokens is not None:
        tokens, assistant = conversation.tokens, conversation.assistant
        assert assistant is not None, "tokens come with their mask"
        if tokens.max() >= len(tokenizer):
            raise InputError(
                f"{conversation.where}: token {tokens.max()} is outside the tokenizer's {len(tokenizer)}; the row was "
                "tokenised for another target"
            )
        if options.last_turn_only:
            assistant = _last_run(assistant)
    else:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(f"{conversation.where}: the target's tokenizer has no chat template")
        text = _text(tokenizer, conversation, conversation.messages)
        _check_tools(conversation, text)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens = np.asarray(encoded["input_ids"], np.int32)
        starts, ends = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
        if _MARKS.search(tokenizer.get_chat_template()):
            marked = _text(
                tokenizer, conversation, conversation.messages, tokenize=True, return_dict=True,
                return_assistant_tokens_mask=True,
            )["assistant_masks"]  # fmt: skip
            assistant = np.asarray(marked, bool)
            assistant = _last_run(assistant) if options.last_turn_only else assistant
        else:
            assistant = np.zeros(len(tokens), bool)
            for begin, end in _prefix_spans(tokenizer, conversation, text, options):
                assistant |= _within(starts, ends, begin, _turn_end(tokenizer, text, begin, end))
        if options.mask_reasoning:
            for match in _REASONING.finditer(text):
                assistant &= ~_within(starts, ends, *match.span())
    cut = slice(options.max_length)
    return Rendered(tokens[cut], assistant[cut])


def _within(starts: np.ndarray, ends: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Tokens that begin in the span. One that began before it was not produced there."""
    return (starts >= begin) & (starts < end) & (ends > starts)


def _last_run(assistant: np.ndarray) -> np.ndarray:
    at = np.flatnonzero(assistant)
    if not at.size:
        return assistant
    gaps = np.flatnonzero(np.diff(at) > 1)
    kept = np.zeros_like(assistant)
    kept[at[gaps[-1] + 1 if gaps.size else 0] : at[-1] + 1] = True
    return kept


def _text(tokenizer: Any, conversation: Conversation, messages: Any, tokenize: bool = False, **options: Any) -> Any:
    tools = None if conversation.tools is None else list(conversation.tools)
    try:
        return tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=tokenize, **options)
    except (TemplateError, SecurityError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise InputError(f"{conversation.where}: the chat template refuses this conversation: {error}") from error


def _check_tools(conversation: Conversation, text: str) -> None:
    calls = [call for message in conversation.messages for call in message.get("tool_calls") or ()]
    for tool in (*calls, *(conversation.tools or ())):
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or name not in text:
            raise InputError(
                f"{conversation.where}: the chat template writes nothing of the tool {name!r}; it knows no tools, or "
                "not in this shape, and the target would not see what was called: leave the row out, or give a "
                "template with tools"
            )


def _prefix_spans(tokenizer: Any, conversation: Conversation, text: str, options: ChatOptions) -> list[tuple[int, int]]:
    turns = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    spans = []
    for i in turns[-1:] if options.last_turn_only else turns:
        before = _text(tokenizer, conversation, conversation.messages[:i], add_generation_prompt=True) if i else ""
        after = _text(tokenizer, conversation, conversation.messages[: i + 1])
        for prefix, what in ((before, "before"), (after, "up to and with")):
            if not text.startswith(prefix):
                raise InputError(_unstable(conversation, i, what, prefix, text))
        spans.append((len(before), len(after)))
    return spans


def _unstable(conversation: Conversation, turn: int, what: str, prefix: str, text: str) -> str:
    at = next((k for k, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), min(len(prefix), len(text)))
    near = slice(max(at - _SHOWN // 2, 0), at + _SHOWN // 2)
    return (
        f"{conversation.where}: the chat template is not prefix-stable: {what} message {turn} it renders\n"
        f"    ...{prefix[near]!r}\n  but the whole conversation there reads\n    ...{text[near]!r}\n"
        "  so what the assistant produced cannot be told. Train on the last turn alone (data.last_turn_only=true), or "
        "give a template with {% generation %} marks"
    )


def _turn_end(tokenizer: Any, text: str, begin: int, end: int) -> int:
    """Where a turn ends: after its end-of-turn token, before what the template writes behind that."""
    region = text[begin:end]
    kept = region.rstrip()
    ends_by_token = any(kept.endswith(token) for token in tokenizer.all_special_tokens if token)
    return begin + len(kept) if ends_by_token else end


@dataclasses.dataclass(frozen=True)
class RenderedFile:
    """The rows of a file, as the target reads them."""

    rows: list[Rendered]
    silent: int  # rows that supervise nothing, left out
    digest: str  # of the tokens and masks


def render_all(
    conversations: Iterable[Conversation], tokenizer: Any, options: ChatOptions, max_silent: float,
    field: str = "--max-silent",
) -> RenderedFile:  # fmt: skip
    """Every conversation that supervises something.

    Args:
        field: where the user set `max_silent`, for the message.

    Raises:
        InputError: see `render`; more than a share of `max_silent` rows supervise nothing, or there are no rows.
    """
    rows, silent = [], 0
    for conversation in conversations:
        rendered = render(tokenizer, conversation, options)
        if not rendered.assistant.any():
            silent += 1
            continue
        rows.append(rendered)
    total = len(rows) + silent
    if silent > max_silent * total or not rows:
        raise InputError(
            f"{silent} of {total} conversations supervise nothing, more than a share of {max_silent} ({field}): the "
            "assistant says nothing in them, or what it says lies behind the length where rows are cut; look with: "
            "python -m flaxdraft.data show"
        )
    return RenderedFile(rows, silent, rows_digest(rows))


def tokenizer_digest(tokenizer: Any) -> str:
    """Of what decides how text becomes tokens: the tokenizer itself and its chat template."""
    text = tokenizer.backend_tokenizer.to_str() + "\n" + (tokenizer.chat_template or "")
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
