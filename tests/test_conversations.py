"""Rows of conversation files: every shape is read, every broken one named."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from flaxdraft.data.conversations import read_conversations
from flaxdraft.errors import InputError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def read(tmp_path, *rows, name="c.jsonl"):
    path = tmp_path / name
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return list(read_conversations(path))


def test_messages_and_sharegpt_are_the_same(tmp_path):
    sharegpt = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "source": "web"}
    first, second = read(tmp_path, {"messages": [USER, ANSWER], "id": 12}, "", sharegpt)
    assert first.messages == second.messages == (USER, ANSWER)
    assert (first.id, first.split, first.category) == ("12", "train", "")
    assert (second.id, second.where) == ("c.jsonl:3", f"{tmp_path / 'c.jsonl'} row 3")


def test_text_parts_tool_calls_and_tools(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = {
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": [call]}],
        "tools": json.dumps([{"name": "f"}]), "category": "tools", "split": "held_out",
    }  # fmt: skip
    (read_row,) = read(tmp_path, row)
    assert read_row.messages == (
        {"role": "user", "content": "ab"}, {"role": "assistant", "content": "", "tool_calls": [call]}
    )  # fmt: skip
    assert read_row.tools == ({"name": "f"},)
    assert (read_row.category, read_row.split) == ("tools", "held_out")


@pytest.mark.parametrize("text", ["é 日本 🙂", "a\u2028b", "a\x85b", "a\nb"], ids=ascii)
def test_any_text_is_read_back(tmp_path, text):
    (row,) = read(tmp_path, {"messages": [{"role": "user", "content": text}, ANSWER]})
    assert row.messages[0]["content"] == text


def test_parquet_rows_are_the_same(tmp_path):
    rows = [{"messages": [USER, ANSWER], "conversations": None}, {"messages": None, "conversations": [USER]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    first, second = read_conversations(tmp_path / "c.parquet")
    assert (first.messages, second.messages) == ((USER, ANSWER), (USER,))
    (tmp_path / "d.parquet").write_bytes((tmp_path / "c.parquet").read_bytes()[:-9])
    with pytest.raises(InputError, match=r"d.parquet: not a readable Parquet file"):
        list(read_conversations(tmp_path / "d.parquet"))


def test_tokens(tmp_path):
    (row,) = read(tmp_path, {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]})
    assert (row.tokens.dtype, row.assistant.dtype) == (np.int32, bool)
    assert row.assistant.tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"messages": [', r"row 1: not valid JSON"),
        ("[1]", r"row 1: expected an object, found list"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', r"row 1: not text in JSON"),
        ({"text": "x"}, r"row 1: expected one of messages, conversations.*; found only text"),
        ({"messages": [USER], "conversations": [USER]}, r"found both"),
        ({"messages": []}, r"messages: expected a non-empty list, found \[\]"),
        ({"messages": ["hi"]}, r"messages\[0\]: expected an object, found 'hi'"),
        (
            {"messages": [USER, {"role": "bot", "content": "a"}]},
            r"messages\[1\]: role: found 'bot', expected one",
        ),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: content: expected text .*, found None"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"content: expected text"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, r"conversations\[0\]: from: found 'alien'"),
        (
            {"messages": [{**ANSWER, "tool_calls": 5}]},
            r"messages\[0\]: tool_calls: expected a list of objects, found 5",
        ),
        ({"messages": [{**ANSWER, "tool_calls": ["f"]}]}, r"tool_calls: expected a list of objects"),
        ({"messages": [USER], "id": ["x"]}, r"row 1: id: expected text, found \['x'\]"),
        ({"messages": [USER], "tools": "{"}, r"tools: not valid JSON"),
        ({"messages": [USER], "tools": [1]}, r"tools: expected a list of objects"),
        ({"input_ids": [1, 2]}, r"loss_mask: expected a non-empty list of integers, found None"),
        ({"input_ids": [1, "a"], "loss_mask": [0, 1]}, r"input_ids: expected a non-empty list of integers"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, r"input_ids has 2 entries, loss_mask 1"),
        ({"input_ids": [1, -2], "loss_mask": [0, 1]}, r"input_ids: found -2..1, expected token ids"),
        ({"input_ids": [1, 2], "loss_mask": [0, 2]}, r"loss_mask: found \[0, 2\], expected 0 and 1"),
    ],
)
def test_broken_rows_are_named(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, row)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"none.jsonl: cannot be read \(No such file"):
        list(read_conversations(tmp_path / "none.jsonl"))


@pytest.mark.parametrize("content", ["", "\n \n"], ids=["empty", "blank"])
def test_a_file_without_rows(tmp_path, content):
    (tmp_path / "c.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"c.jsonl: holds no conversations; expected one a line, with messages"):
        list(read_conversations(tmp_path / "c.jsonl"))


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(b'{"messages": []}\n'[:5] + b"\xff\n")
    with pytest.raises(InputError, match=r"row 1: not UTF-8 text \(byte 5 of the row\)"):
        list(read_conversations(tmp_path / "c.jsonl"))
