"""Tool calls and tools as a template takes them, in whatever form a row has them.

OpenAI's form keeps a call's arguments as JSON text; templates expect an object, which serving engines make of it before
they render, and so does this. A template that writes arguments as they are (DeepSeek's) takes text: it is given text
where it refuses the object, or would write it as Python does. Arrow gives every row the keys of all rows, as nulls; a
null is left out wherever it stands, so that a row is the same from JSON lines and from Parquet.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from flaxdraft.data.chat import Chat
from flaxdraft.data.chat_template import ChatTemplate
from flaxdraft.data.conversations import Conversation
from flaxdraft.errors import InputError

Message = dict[str, Any]
_ARGUMENTS = {"flaxdraft_argument": "value"}  # that templates are asked with; they stand in no conversation


def as_chat(
    tokenizer: Any, conversation: Conversation, template: ChatTemplate, stop_tokens: Sequence[int] = ()
) -> tuple[Chat, str]:  # fmt: skip
    """The conversation as its template takes it, and what the template makes of it.

    Args:
        stop_tokens: that end an answer of the target.

    Raises:
        InputError: the template refuses it, or writes nothing of its tools.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{conversation.where}: the target's tokenizer has no chat template")
    objects = [_with_arguments(message, _as_object) for message in conversation.messages]
    try:
        texts = [_with_arguments(message, _as_text) for message in conversation.messages]
    except (TypeError, ValueError, RecursionError) as error:  # Parquet files hold dates and bytes
        raise InputError(f"{conversation.where}: tool_calls: arguments: no JSON ({error})") from error
    stops = tuple(stop for stop in tokenizer.convert_ids_to_tokens([*stop_tokens]) if stop)
    chat = Chat(tokenizer, template, conversation.where, objects, conversation.tools, stops)
    try:
        text = chat.text(objects)
        refused = None
    except InputError as error:
        text, refused = "", error
    calls = [*_calls(objects)]
    if calls and (refused or (any(call["arguments"] for call in calls) and _writes_python(chat))):
        try:
            text = chat.text(texts)
            chat, refused = dataclasses.replace(chat, messages=texts), None
        except InputError as error:
            refused = refused or error
    if refused is not None:
        raise refused
    _check_written(chat, text)
    return chat, text


def _writes_python(chat: Chat) -> bool:
    """Whether the template writes a call's arguments as Python would, in braces and single quotes."""
    try:
        probed = chat.text([_with_arguments(message, lambda _: _ARGUMENTS) for message in chat.messages])
    except InputError:
        return False
    return str(_ARGUMENTS) in probed


def _calls(messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    """Yields the function of each call: its name and arguments."""
    for message in messages:
        for call in message.get("tool_calls") or ():
            function = call.get("function", call)
            if isinstance(function, dict):
                yield function


def _with_arguments(message: Message, form: Any) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function")
        if isinstance(function, dict):
            calls.append({**call, "function": {**function, "arguments": form(function.get("arguments"))}})
        else:
            calls.append({**call, "arguments": form(call.get("arguments"))})
    return {**message, "tool_calls": calls}


def _as_object(arguments: Any) -> Any:
    if isinstance(arguments, str):
        arguments = json.loads(arguments) if arguments.strip() else None
    return {} if arguments is None else arguments


def _as_text(arguments: Any) -> str:
    found = _as_object(arguments)
    return arguments if isinstance(arguments, str) and found else json.dumps(found, ensure_ascii=False)


def _check_written(chat: Chat, text: str) -> None:
    """Checks that the template writes every call and every tool by name. People may say such a name, too: one that is
    written stands there more often than without the calls, or without the tools.

    Raises:
        InputError: the template leaves out a call or a tool.
    """
    if calls := [call for message in chat.messages for call in message.get("tool_calls") or ()]:
        silent = [{key: message[key] for key in message if key != "tool_calls"} for message in chat.messages]
        _check_names(chat.where, calls, text, _text_or_nothing(chat, silent))
    if chat.tools:
        _check_names(chat.where, chat.tools, text, _text_or_nothing(dataclasses.replace(chat, tools=()), chat.messages))


def _text_or_nothing(chat: Chat, messages: Sequence[Message]) -> str:
    """The rendering; nothing where it is refused. Some templates refuse a tool's result without its call."""
    try:
        return chat.text(messages)
    except InputError:
        return ""


def _check_names(where: str, tools: Sequence[dict[str, Any]], text: str, without: str) -> None:
    for tool in tools:
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or text.count(name) <= without.count(name):
            raise InputError(
                f"{where}: the chat template writes nothing of the tool {name!r}; it knows no tools, or not in this "
                "shape, and the target would not see what was called: leave the row out, or give a template with tools"
            )
