"""Conversations from files: JSON (lines, or one array) or Parquet, in the shapes that people have.

A row is one of
- `messages`: a list of {role, content, ...} (OpenAI's and Hugging Face's shape; tool calls and reasoning pass through),
- `conversations`: a list of {from, value} (ShareGPT's shape), or of {role, content},
- `input_ids` with `loss_mask`: tokens already, and 1 where the assistant produced them.
Beside it stand, optionally, `id`, `category`, `split` and `tools`. Anything else a row holds is left alone: public data
sets carry many more columns.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flaxdraft.data.bad_rows import BadRows
from flaxdraft.errors import InputError
from flaxdraft.files.json_files import read_json_lines

# ShareGPT's speakers.
_SPEAKERS = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "assistant": "assistant", "model": "assistant", "function_call": "assistant", "tool": "tool",
    "function": "tool", "observation": "tool",
}  # fmt: skip
ROLES = ("system", "developer", "user", "assistant", "tool")
_FIELDS = ("messages", "conversations", "input_ids", "loss_mask", "tools", "functions", "id", "category", "split")
SHAPES = "messages, conversations, or input_ids with loss_mask"


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One row of a file. Either `messages`, or `tokens` with `assistant`."""

    where: str  # file and row, for messages to the user
    id: str
    category: str
    split: str
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] | None = None
    tokens: np.ndarray | None = None  # int32 [L]
    assistant: np.ndarray | None = None  # bool [L], true where the assistant produced the token


def read_conversations(path: str | Path, bad: BadRows | None = None) -> Iterator[Conversation]:
    """The rows of a file of JSON lines, of one JSON array, or of a .parquet file, one at a time.

    Args:
        bad: is given the broken rows, which are then left out.

    Raises:
        InputError: the file cannot be read or holds no row, or a row is broken: it is named by its number, with what
            was found there.
    """
    path, number = Path(path).expanduser(), 0
    rows = _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path, bad)
    for number, row in rows:
        try:
            conversation = parse(row, f"{path} row {number}", f"{path.name}:{number}")
        except InputError as error:
            if bad is None:
                raise
            bad.add(error)
        else:
            yield conversation
    if number == 0 and not (bad and bad.messages):
        raise InputError(f"{path}: holds no conversations; expected one a line, with {SHAPES}")


def _json_rows(path: Path, bad: BadRows | None) -> Iterator[tuple[int, Any]]:
    try:
        yield from read_json_lines(path, "row", None if bad is None else bad.add)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path}: reading Parquet needs pyarrow; pip install 'flaxdraft[parquet]'") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for batch in file.iter_batches(
                batch_size=256, columns=[name for name in names if name in _FIELDS] or names
            ):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: not a readable Parquet file ({error}), behind row {number}") from error


def parse(row: Any, where: str, default_id: str) -> Conversation:
    """One row of either format.

    Raises:
        InputError: see `read_conversations`.
    """
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object, found {type(row).__name__}")
    try:
        return _parse(row, where, default_id)
    except RecursionError as error:
        raise InputError(f"{where}: nested too deep to be read") from error


def _parse(row: dict[str, Any], where: str, default_id: str) -> Conversation:
    names = sorted(key for key in row if row[key] is not None)
    row = _without_nulls({key: row[key] for key in _FIELDS if key in row})
    labels = {"id": default_id, "category": "", "split": "train"}
    name, category, split = (_text(row.get(key, default), where, key) for key, default in labels.items())
    if "input_ids" in row:
        tokens, assistant = _tokens(row, where)
        return Conversation(where, name, category, split, tokens=tokens, assistant=assistant)
    if ("messages" in row) == ("conversations" in row):
        found = "both" if "messages" in row else f"only {', '.join(names)}" if names else "nothing"
        raise InputError(f"{where}: expected one of {SHAPES}; found {found}")
    key = "messages" if "messages" in row else "conversations"
    messages = row[key]
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: {key}: expected a non-empty list, found {_brief(messages)}")
    parsed = tuple(_message(message, f"{where}: {key}[{i}]") for i, message in enumerate(messages))
    return Conversation(where, name, category, split, parsed, _tools(row, where))


def _text(value: Any, where: str, key: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # numbered rows
    if not isinstance(value, str):
        raise InputError(f"{where}: {key}: expected text, found {_brief(value)}")
    return value


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InputError(f"{where}: expected an object, found {_brief(message)}")
    if "from" in message and "role" not in message:
        speaker = message.pop("from")
        if not isinstance(speaker, str) or speaker not in _SPEAKERS:
            raise InputError(f"{where}: from: found {_brief(speaker)}, expected one of {', '.join(_SPEAKERS)}")
        content = {"content": message.pop("value", None)}
        if speaker == "function_call":  # what is called, in JSON
            content = {"content": None, "tool_calls": _spoken_calls(content["content"], f"{where}: value")}
        message = {"role": _SPEAKERS[speaker], **content, **message}
    if message.get("role") == "function":  # OpenAI's older name
        message = {**message, "role": "tool"}
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise InputError(f"{where}: role: found {_brief(role)}, expected one of {', '.join(ROLES)}")
    if calls := _calls(message, where):
        message = {**message, "tool_calls": calls}
        if content is None and role == "assistant":
            return {**message, "content": ""}
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        return {**message, "content": "".join(part["text"] for part in content)}
    if not isinstance(content, str):
        raise InputError(f"{where}: content: expected text (or a list of text parts), found {_brief(content)}")
    return message


def _without_nulls(value: Any) -> Any:
    """Leaves out nulls at any depth, which Arrow writes for fields that a row has not, and makes objects of Arrow's
    maps, which are lists of pairs."""
    if isinstance(value, list) and value and all(isinstance(inner, tuple) for inner in value):
        value = dict(value)
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list) and any(isinstance(inner, (dict, list)) for inner in value):
        return [_without_nulls(inner) for inner in value]
    return value


def _from_json(value: Any, where: str) -> Any:
    """Parses JSON text, in which Parquet data sets keep what has no common type; empty text is None. Any other value
    stays."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from error


def _tools(row: dict[str, Any], where: str) -> tuple[dict[str, Any], ...] | None:
    """The tools of a row. OpenAI's older `functions` are the same without a frame."""
    tools = _from_json(row.get("tools"), f"{where}: tools")
    functions = _from_json(row.get("functions"), f"{where}: functions")
    name, found = ("tools", tools) if tools or not functions else ("functions", functions)
    if not found:
        return None
    found = [_from_json(item, f"{where}: {name}") for item in found] if isinstance(found, list) else found
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise InputError(f"{where}: {name}: expected a list of objects, found {_brief(found)}")
    if name == "functions":
        found = [*map(_framed, found)]
    return tuple(_without_nulls([_tool(tool, f"{where}: {name}") for tool in found]))


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    tool = _parsed(tool, "function", where)
    if isinstance(function := tool.get("function"), dict):
        return {**tool, "function": _parsed(function, "parameters", where)}
    return _parsed(tool, "parameters", where)


def _parsed(holder: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """The mapping with the value under a key parsed, where that is JSON text."""
    return {**holder, key: _from_json(holder[key], f"{where}: {key}")} if key in holder else holder


def _spoken_calls(value: Any, where: str) -> list[Any]:
    """ShareGPT's calls: {name, arguments} or a list of them."""
    called = _from_json(value, where)
    calls = called if isinstance(called, list) else [called]
    return [call if isinstance(call, dict) and "function" in call else _framed(call) for call in calls]


def _framed(function: Any) -> dict[str, Any]:
    return {"type": "function", "function": function}


def _calls(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The message's tool calls, whose arguments are checked; OpenAI's older single `function_call` is taken out of it.

    Raises:
        InputError: they are no calls, or their arguments are no JSON object.
    """
    calls = _from_json(message.pop("tool_calls", None), f"{where}: tool_calls") or []
    called = _from_json(message.pop("function_call", None), f"{where}: function_call")
    if isinstance(called, dict):
        calls = [_framed(called)]
    elif called is not None:
        raise InputError(f"{where}: function_call: expected an object, found {_brief(called)}")
    if isinstance(calls, list):
        calls = [_call(call, f"{where}: tool_calls") for call in calls]
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InputError(f"{where}: tool_calls: expected a list of objects, found {_brief(calls)}")
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict):
            raise InputError(f"{where}: tool_calls: function: expected an object, found {_brief(function)}")
        arguments = _from_json(function.get("arguments"), f"{where}: tool_calls: arguments")
        if not isinstance(arguments, (dict, type(None))):
            raise InputError(f"{where}: tool_calls: arguments: expected a JSON object, found {_brief(arguments)}")
    return calls


def _call(call: Any, where: str) -> Any:
    """A tool call, parsed where it, or its function, is JSON text."""
    if isinstance(call, str) and call.lstrip().startswith("{"):
        call = _from_json(call, where)
    return _parsed(call, "function", where) if isinstance(call, dict) else call


def _tokens(row: dict[str, Any], where: str) -> tuple[np.ndarray, np.ndarray]:
    columns = {}
    for key in ("input_ids", "loss_mask"):
        value = row.get(key)
        whole = isinstance(value, list) and all(isinstance(x, int) for x in value)
        if not whole or not value:
            raise InputError(f"{where}: {key}: expected a non-empty list of integers, found {_brief(value)}")
        columns[key] = value
    ids, mask = columns["input_ids"], columns["loss_mask"]
    if len(ids) != len(mask):
        raise InputError(f"{where}: input_ids has {len(ids)} entries, loss_mask {len(mask)}; they must go together")
    if not 0 <= min(ids) <= max(ids) < 2**31:
        raise InputError(f"{where}: input_ids: found {min(ids)}..{max(ids)}, expected token ids from 0 on")
    if not set(mask) <= {0, 1}:
        raise InputError(f"{where}: loss_mask: found {_brief(sorted(set(mask)))}, expected 0 and 1")
    return np.asarray(ids, np.int32), np.asarray(mask, bool)
