"""Tool calls and tools in the shapes that files have: what becomes of them, and what is refused by row."""

import contextlib
import datetime
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from small_chats import ASKS, BODY, CALLED, FOOTER, HELLO, HI, IM, TOOLED, Kind, calls, row_of, spans, tokenizer_of

from flaxdraft.data.chat_template import ChatTemplate
from flaxdraft.data.conversations import parse, read_conversations
from flaxdraft.data.prompts import render_messages
from flaxdraft.data.talks import Answering, Asking, Talk, earlier_mask
from flaxdraft.data.templates import ChatOptions, render
from flaxdraft.errors import InputError

FUNCTION = {"name": "weather", "arguments": {"city": "Oslo"}}
WRITTEN = 'weather{"city": "Oslo"}<|im_end|>'


def writing(arguments, name="c.function.name"):
    return tokenizer_of(TOOLED.replace("@f", "{{ " + name + " }}{{ " + arguments + " }}") + ASKS, IM, Kind())


JSON, PLAIN = writing("c.function.arguments | tojson"), writing("c.function.arguments")


@pytest.mark.parametrize(
    ("written", "want"),
    [
        ("c.function.arguments | tojson", '{"city": "Oslo"}'),
        ("c.function.arguments", '{"city":"Oslo"}'),  # as text alone: it would write an object as Python does
        ("'```' + c.function.arguments", '```{"city":"Oslo"}'),  # which refuses an object
        ("c.function.arguments | tojson if c.function.arguments is mapping else '?'", '{"city": "Oslo"}'),
        ("c.function.arguments | items | first | join('=')", "city=Oslo"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["text", "object", "function_call"])
def test_arguments_are_given_as_the_template_takes_them(written, want, form):
    template = TOOLED.replace("@f", "weather{{ " + written + " }}")
    messages = calls('{"city":"Oslo"}' if form != "object" else {"city": "Oslo"})
    if form == "function_call":
        messages = [HI, {**CALLED, "function_call": messages[1]["tool_calls"][0]["function"]}]
    if form == "object":
        want = want.replace('":"', '": "')
    assert spans(tokenizer_of(template + ASKS, IM, Kind()), row_of(messages)) == [f"weather{want}<|im_end|>"]


def test_functions_are_tools():
    tool = {"name": "weather", "parameters": {}}
    old, new = (
        row_of([HI, HELLO], functions=[tool]),
        row_of([HI, HELLO], tools=[{"type": "function", "function": tool}]),
    )
    assert old.tools == new.tools


@pytest.mark.parametrize("arguments", ["{", "[1]", "3", [1]])
def test_arguments_that_are_no_object(arguments):
    with pytest.raises(
        InputError, match=r"messages\[1\]: tool_calls: arguments: (not valid JSON|expected a JSON object)"
    ):
        row_of(calls(arguments))


def test_a_row_is_the_same_from_json_lines_and_from_parquet(tmp_path):
    """Arrow gives each row the keys of all."""
    schema = lambda **more: [{"type": "function", "function": {"name": "weather", "parameters": {"p": more}}}]  # noqa: E731
    rows = [
        {"messages": calls({"city": "Oslo"}), "tools": schema(city="text")},
        {"messages": calls({"day": 3}), "tools": schema(day="number")},
        {"messages": [HI, HELLO]},
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    template = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + TOOLED.replace(
        "@f", "weather{{ c | tojson }}"
    )
    tokenizer = tokenizer_of(template + ASKS, IM, Kind())
    lines, table = (
        [render(tokenizer, row, ChatOptions(1000)) for row in read_conversations(tmp_path / name)]
        for name in ("c.jsonl", "c.parquet")
    )
    for one, other in zip(lines, table, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.assistant, other.assistant)


def test_arguments_in_a_map(tmp_path):
    """As Spark writes them."""
    text = pyarrow.string()
    function = pyarrow.struct([("name", text), ("arguments", pyarrow.map_(text, text))])
    call = pyarrow.struct([("type", text), ("function", function)])
    message = [("role", text), ("content", text), ("tool_calls", pyarrow.list_(call))]
    schema = pyarrow.schema([("messages", pyarrow.list_(pyarrow.struct(message)))])
    table = pyarrow.Table.from_pylist([{"messages": calls({"city": "Oslo"})}, {"messages": [HI, HELLO]}], schema=schema)
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    first, second = read_conversations(tmp_path / "c.parquet")
    assert spans(JSON, first) == [WRITTEN]
    assert spans(JSON, second) == ["hello<|im_end|>"]


@pytest.mark.parametrize("value", [datetime.datetime(2026, 1, 31), b"x"])
def test_arguments_that_are_no_json_are_refused_by_row(value):
    for tokenizer in (JSON, PLAIN, writing("'```' + c.function.arguments")):
        with pytest.raises(InputError, match=r"chat.jsonl row 1: tool_calls: arguments: no JSON"):
            spans(tokenizer, row_of(calls({"day": value})))


def test_a_row_that_is_nested_deep(tmp_path):
    """How deep is too deep depends on the version of Python."""
    path, row = tmp_path / "c.jsonl", json.dumps({"messages": [{**HI, "more": "@"}, HELLO], "metadata": "@"})
    for depth in (700, 900, 990, 3000, 100_000):
        deep = "[" * depth + "]" * depth
        path.write_text(row.replace('"@"', deep))
        with contextlib.suppress(InputError):
            spans(JSON, next(read_conversations(path)))
    with pytest.raises(InputError, match=r"row 1: (nested too deep|not text in JSON)"):
        next(read_conversations(path))
    path.write_text(row.replace('"more": "@"', '"more": 1').replace('"@"', "[" * 700 + "]" * 700))
    assert len([*read_conversations(path)]) == 1  # nobody looks at other fields


@pytest.mark.parametrize(
    "wrong", ["{{ 1 // (messages | length - 2) }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"]
)
def test_templates_that_compute_what_they_cannot(wrong):
    with pytest.raises(InputError, match="the chat template refuses this conversation"):
        spans(tokenizer_of(wrong + BODY + ASKS, IM, Kind()), row_of([HI, HELLO]))


def test_what_people_say_does_not_decide_how_arguments_are_written():
    said = {**HI, "content": "I ran weather(**{'city': 'Oslo'})"}
    assert spans(JSON, row_of([said, *calls('{"city":"Oslo"}')])) == [WRITTEN]
    assert spans(PLAIN, row_of([said, *calls('{"city":"Oslo"}')])) == ['weather{"city":"Oslo"}<|im_end|>']


@pytest.mark.parametrize("arguments", [{}, "", None, "null", " {} "])
def test_no_arguments(arguments):
    for tokenizer in (JSON, PLAIN, writing("'' + c.function.arguments")):
        assert spans(tokenizer, row_of(calls(arguments))) == ["weather{}<|im_end|>"]


def test_a_tool_whose_name_stands_in_what_people_say():
    said = {**HI, "content": "what is the weather?"}
    tools = [{"type": "function", "function": {"name": "weather"}}]
    for messages, fields in (([said, *calls({})[1:]], {}), ([said, HELLO], {"tools": tools})):
        with pytest.raises(InputError, match="writes nothing of the tool 'weather'"):
            spans(tokenizer_of(BODY + ASKS, IM, Kind()), row_of(messages, **fields))
    assert spans(JSON, row_of([said, *calls({"city": "Oslo"})[1:]])) == [WRITTEN]


@pytest.mark.parametrize(
    "message",
    [
        {"from": "function_call", "value": json.dumps(FUNCTION)},
        {"from": "function_call", "value": json.dumps([FUNCTION])},
        {"role": "assistant", "content": "", "function_call": json.dumps(FUNCTION)},
        {"role": "assistant", "tool_calls": [json.dumps({"function": FUNCTION})]},
        {"role": "assistant", "tool_calls": [{"function": json.dumps(FUNCTION)}]},
    ],
)
def test_calls_in_json_text(message):
    asked = {"from": "human", "value": "w?"} if "from" in message else HI
    row = {"conversations": [asked, message, {"role": "function", "name": "weather", "content": "3"}]}
    parsed = parse(row, "chat.jsonl row 1", "chat:1")
    assert [one["role"] for one in parsed.messages] == ["user", "assistant", "tool"]
    assert spans(JSON, parsed) == [WRITTEN]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"from": "function_call", "value": "weather in Oslo"}, "value: not valid JSON"),
        ({"from": "function_call", "value": "3"}, "tool_calls: function: expected an object, found 3"),
        ({"role": "assistant", "content": "", "function_call": "weather"}, "function_call: not valid JSON"),
        ({"role": "assistant", "content": "", "function_call": [1]}, "function_call: expected an object, found "),
    ],
)
def test_calls_that_are_none(message, words):
    with pytest.raises(InputError, match=rf"row 1: conversations\[0\]: {words}"):
        parse({"conversations": [message]}, "chat.jsonl row 1", "chat:1")


def test_tools_in_json_text():
    function = {"name": "w", "parameters": {"type": "object"}}
    tools = ({"type": "function", "function": function},)
    text = {**function, "parameters": json.dumps(function["parameters"])}
    for fields in (
        {"tools": [json.dumps(tools[0])]}, {"tools": [{**tools[0], "function": json.dumps(text)}]},
        {"functions": [json.dumps(text)]}, {"functions": json.dumps([function])}, {"functions": [text]},
    ):  # fmt: skip
        assert row_of([HI, HELLO], **fields).tools == tools
    assert row_of([HI, HELLO], tools=[text]).tools == (function,)
    for wrong in ({"name": "w"}, [1]):
        with pytest.raises(InputError, match="functions: expected a list of objects"):
            row_of([HI, HELLO], functions=wrong)


def test_earlier_answers_are_learned_from_where_a_template_ends_in_an_end_of_text():
    """Phi-3's kind."""
    kind = Kind(named=False)
    for template in (BODY + FOOTER, BODY + ASKS):
        tokenizer = tokenizer_of(template, IM, kind)
        stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<eos>"])
        answer = tokenizer("hello<|im_end|>", add_special_tokens=False)["input_ids"]
        asked = [HI, HELLO, HI]
        talk = Talk(
            0, row_of(asked), [[HI], [HI]], [*asked, HELLO], render_messages(tokenizer, asked, "x"), [answer] * 2
        )
        assert sum(earlier_mask(talk, Asking(tokenizer, ChatTemplate(), stops, Answering()))) == len(answer)
