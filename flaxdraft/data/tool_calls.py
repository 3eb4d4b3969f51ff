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

from flaxdraft.data.chat_template import ChatTemplate
from flaxdraft.data.conversations import Conversation
from flaxdraft.data.turns import Chat
from flaxdraft.errors import InputError

Message = dict[str, Any]


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
    stops = tuple(stop for stop in tokenizer.convert_ids_to_tokens([*stop_tokens]) if stop)
    chat = Chat(tokenizer, template, conversation.where, objects, conversation.tools, stops)
    try:
        text = chat.text(objects)
        refused = None
    except InputError as error:
        text, refused = "", error
    if any(refused or str(call["arguments"]) in text for call in _calls(objects) if call.get("arguments")):
        texts = [_with_arguments(message, _as_text) for message in conversation.messages]
        try:
            text = chat.text(texts)
            chat, refused = dataclasses.replace(chat, messages=texts), None
        except InputError as error:
            refused = refused or error
    if refused is not None:
        raise refused
    _check_written(conversation, text)
    return chat, text


def _calls(messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    """What each call says of its function."""
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
        return json.loads(arguments) if arguments.strip() else {}
    return {} if arguments is None else arguments


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(_as_object(arguments), ensure_ascii=False)


def _check_written(conversation: Conversation, text: str) -> None:
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
