"""From a conversation to tokens and the mask of what the assistant produced, by the tokenizer's own chat template.

Which characters the assistant wrote is found in turns.py; which tokens those are, in token_spans.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from flaxdraft.data.bad_rows import BadRows
from flaxdraft.data.chat_template import ChatTemplate
from flaxdraft.data.conversations import Conversation
from flaxdraft.data.reasoning import without_reasoning
from flaxdraft.data.token_spans import check_tokens, encode, within
from flaxdraft.data.tool_calls import as_chat
from flaxdraft.data.turns import turns
from flaxdraft.errors import InputError


@dataclasses.dataclass(frozen=True)
class Rendered:
    """One conversation as the target reads it."""

    tokens: np.ndarray  # int32 [L]
    assistant: np.ndarray  # bool [L], true where the assistant produced the token
    num_cut: int = 0  # tokens that stood behind and were cut off


class Masked(Protocol):
    """Tokens, and which of them are supervised: what every row has, before the target has read it and after."""

    @property
    def tokens(self) -> np.ndarray: ...
    @property
    def assistant(self) -> np.ndarray: ...


def rows_digest(rows: Iterable[Masked]) -> str:
    """A digest of tokens and masks: of what a target is asked, and what of it is supervised."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.tokens.tobytes() + row.assistant.tobytes() + b"|")
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    max_length: int
    last_turn_only: bool = False  # supervise the last assistant turn alone
    mask_reasoning: bool = False  # do not supervise what stands between <think> and </think>
    template: ChatTemplate = dataclasses.field(default_factory=ChatTemplate)
    context: int | None = None  # of the target, beyond which rows are cut whatever `max_length` is
    vocab_size: int | None = None  # rows of the target's embedding
    stop_tokens: Sequence[int] = ()  # that end an answer of the target
    answered: bool = False  # whether the target wrote the rows, tokens among them that its tokenizer may not know

    @property
    def limit(self) -> int:
        """Tokens where rows are cut."""
        return self.max_length if self.context is None else min(self.max_length, self.context)


def render(tokenizer: Any, conversation: Conversation, options: ChatOptions) -> Rendered:
    """Tokens and mask, cut at `max_length` and at the target's context.

    Raises:
        InputError: the template refuses the conversation, leaves its tools out, or is not prefix-stable (row and both
            renderings are shown); the row has tokens that the tokenizer or the target has not.
    """
    return render_with_text(tokenizer, conversation, options)[0]


def render_with_text(tokenizer: Any, conversation: Conversation, options: ChatOptions) -> tuple[Rendered, str]:
    """See `render`; with what the chat template made of the messages, nothing for a row of tokens."""
    tokens, assistant, text = _whole(tokenizer, conversation, options)
    check_tokens(tokens, None if options.answered else tokenizer, options.vocab_size, conversation.where)
    if options.mask_reasoning:
        assistant = without_reasoning(tokenizer, tokens, assistant)
    limit = options.limit
    return Rendered(tokens[:limit], assistant[:limit], max(len(tokens) - limit, 0)), text


def _whole(tokenizer: Any, conversation: Conversation, options: ChatOptions) -> tuple[np.ndarray, np.ndarray, str]:
    if conversation.tokens is not None:
        assert conversation.assistant is not None, "tokens come with their mask"
        assistant = conversation.assistant
        return conversation.tokens, _last_run(assistant) if options.last_turn_only else assistant, ""
    chat, text = as_chat(tokenizer, conversation, options.template, options.stop_tokens)
    tokens, starts = encode(tokenizer, text)
    assistant = np.zeros(len(tokens), bool)
    for begin, end in turns(chat, text, options.last_turn_only):
        assistant |= within(starts, begin, end)
    return tokens, assistant, text


def _last_run(assistant: np.ndarray) -> np.ndarray:
    at = np.flatnonzero(assistant)
    if not at.size:
        return assistant
    gaps = np.flatnonzero(np.diff(at) > 1)
    kept = np.zeros_like(assistant)
    kept[at[gaps[-1] + 1 if gaps.size else 0] : at[-1] + 1] = True
    return kept


@dataclasses.dataclass(frozen=True)
class RenderedFile:
    """The rows of a file, as the target reads them."""

    rows: list[Rendered]
    silent: int  # rows that supervise nothing, left out
    cut: int  # rows that were longer than they may be
    digest: str  # of the tokens and masks


def render_all(
    conversations: Iterable[Conversation], tokenizer: Any, options: ChatOptions, max_silent: float,
    field: str = "--max-silent", bad: BadRows | None = None,
) -> RenderedFile:  # fmt: skip
    """Every conversation that supervises something.

    Args:
        field: where the user set `max_silent`, for the message.
        bad: is given the rows that cannot be rendered, beside those that could not be read.

    Raises:
        InputError: see `render` and `BadRows.judge`; more than a share of `max_silent` rows supervise nothing, or there
            are no rows.
    """
    rows, silent, cut = [], 0, 0
    for conversation in conversations:
        try:
            rendered = render(tokenizer, conversation, options)
        except InputError as error:
            if bad is None:
                raise
            bad.add(error)
            continue
        cut += rendered.num_cut > 0
        if not rendered.assistant.any():
            silent += 1
            continue
        rows.append(rendered)
    if bad is not None:
        bad.judge()
    total = len(rows) + silent
    if silent > max_silent * total or not rows:
        raise InputError(
            f"{silent} of {total} conversations supervise nothing, more than a share of {max_silent} ({field}): the "
            "assistant says nothing in them, or what it says lies behind the length where rows are cut; look with: "
            "python -m flaxdraft.data show"
        )
    return RenderedFile(rows, silent, cut, rows_digest(rows))


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of what decides how text becomes tokens: the tokenizer itself and its chat template."""
    template = tokenizer.chat_template or ""
    if isinstance(template, dict):  # several by name
        template = json.dumps(template, sort_keys=True)
    text = tokenizer.backend_tokenizer.to_str() + "\n" + template
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
