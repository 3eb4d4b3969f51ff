"""Whatever stands in a file, its reader gives rows or an `InputError` that names it."""

import contextlib
import functools
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from fuzzing import SECONDS, fuzz
from hypothesis import strategies as st
from test_chat import SIX, of_family
from test_store import FLAT, SOURCE, same, write_store

from flaxdraft.data.conversations import parse, read_conversations
from flaxdraft.data.store import FeatureStore
from flaxdraft.data.templates import ChatOptions, render
from flaxdraft.errors import InputError

TEXT = st.lists(
    st.sampled_from(["a", " ", "\n", "<think>", "</think>", "<|im_end|>", "</s>", "日本", "\x00", "{% x %}", "é", "🙂"])
    | st.text(max_size=4), max_size=5,
).map("".join)  # fmt: skip
ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "text", "name"]), inner),
    max_leaves=5,
)


def mostly(usual, odd=ODD):
    """Broken in one place of many, so that what is broken is reached."""
    return st.integers(0, 19).flatmap(lambda roll: odd if roll == 0 else usual)


FUNCTION = st.fixed_dictionaries({"name": mostly(TEXT), "arguments": mostly(st.just({"city": "Oslo"}) | TEXT)})
CALL = mostly(st.fixed_dictionaries({"type": mostly(st.just("function")), "function": mostly(FUNCTION)}) | FUNCTION)
PARTS = st.lists(mostly(st.fixed_dictionaries({"type": st.just("text"), "text": mostly(TEXT)})), max_size=2)
MORE = {"tool_calls": mostly(st.lists(CALL, max_size=2)), "reasoning_content": mostly(TEXT), "name": mostly(TEXT)}


def message(role):
    content = mostly(TEXT | st.none() | PARTS)
    return st.fixed_dictionaries({"role": mostly(st.just(role)), "content": content}, optional=MORE)


def spoken(speaker):
    return st.fixed_dictionaries({"from": mostly(st.just(speaker)), "value": mostly(TEXT)})


def turns(one, names):
    """Conversations as people have them, and those that alternate no more."""
    usual = [st.tuples(*map(one, names[:n])) for n in (1, 2, 3, 4)]
    return mostly(st.one_of(usual).map(list), st.lists(st.one_of(*map(one, names)), max_size=4))


MESSAGES = turns(message, ["user", "assistant", "tool", "assistant"]) | turns(message, ["system", "user", "assistant"])
EXTRA = {"tools": mostly(st.lists(CALL, max_size=2)), "id": mostly(TEXT), "split": mostly(TEXT), "category": ODD}
TOKENS = st.integers(1, 8).flatmap(
    lambda num: st.fixed_dictionaries({
        "input_ids": mostly(st.lists(mostly(st.integers(0, 300)), min_size=num, max_size=num)),
        "loss_mask": mostly(st.lists(mostly(st.integers(0, 1)), min_size=num, max_size=num)),
    }, optional=EXTRA)
)  # fmt: skip
ROW = mostly(
    st.fixed_dictionaries({"messages": mostly(MESSAGES)}, optional=EXTRA)
    | st.fixed_dictionaries({"conversations": mostly(turns(spoken, ["human", "gpt", "human", "gpt"]))}, optional=EXTRA)
    | TOKENS
)
OPTIONS = st.builds(
    ChatOptions, max_length=st.integers(1, 64), last_turn_only=st.booleans(), mask_reasoning=st.booleans()
)


@functools.cache
def tokenizer(name):
    return of_family(name)


def read_and_render(example):
    row, name, options = example
    with contextlib.suppress(InputError):
        parsed = parse(row, "row", "id")
        assert parsed.messages or len(parsed.tokens)
        rendered = render(tokenizer(name), parsed, options)
        assert len(rendered.tokens) == len(rendered.assistant) <= options.max_length
        assert (rendered.tokens.dtype, rendered.assistant.dtype) == (np.int32, bool)


def damaged(draw, content: bytes) -> bytes:
    """Changed, cut, or added to, somewhere."""
    out = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(out) - 1, 0)))
        match draw(st.sampled_from(["change", "cut", "add", "repeat"])):
            case "change" if out:
                out[at] ^= draw(st.integers(1, 255))
            case "cut":
                del out[at:]
            case "add":
                out[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "repeat":
                out[at:at] = out[at : at + draw(st.integers(1, 64))]
    return bytes(out)


LINES = [
    {"messages": [{"role": "user", "content": "q é"}, {"role": "assistant", "content": "a 🙂", "tool_calls": []}]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "id": 3},
    {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1], "tools": None},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same rows as JSON lines and as Parquet."""
    directory = tmp_path_factory.mktemp("files")
    (directory / "c.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in LINES))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(LINES), directory / "c.parquet")
    return {name: (directory / name).read_bytes() for name in ("c.jsonl", "c.parquet")}


def read_file(directory, name, content):
    path = directory / name
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        list(read_conversations(path))


def read_store(directory, changes):
    """A copy of a whole store whose files are changed: refused, or the rows that were written."""
    originals = {}
    for name, content in changes.items():
        originals[name] = (directory / name).read_bytes()
        (directory / name).write_bytes(content)
    try:
        with contextlib.suppress(InputError):
            store = FeatureStore(directory, {"target": SOURCE.target, "tokenizer": SOURCE.tokenizer})
            assert len(store) == len(FLAT)
            for index, row in enumerate(FLAT):
                same(store.row(index), row)
    finally:
        for name, content in originals.items():
            (directory / name).write_bytes(content)


def test_text_in_parquet_that_is_none(files, tmp_path):
    """Found by fuzzing."""
    content = files["c.parquet"].replace("🙂".encode(), b"\xf4\x9f\x99\x82")
    (tmp_path / "c.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"c.parquet: not a readable Parquet file \('utf-8' codec.*, behind row 0"):
        list(read_conversations(tmp_path / "c.parquet"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("fuzz") / "store")


@pytest.mark.parametrize("seconds", SECONDS)
def test_any_conversations_are_read_or_refused(seconds, files, tmp_path):
    @st.composite
    def some_file(draw):
        name = draw(st.sampled_from(sorted(files)))
        return name, draw(st.binary(max_size=64)) if draw(st.integers(0, 9)) == 0 else damaged(draw, files[name])

    assert fuzz(read_and_render, st.tuples(ROW, st.sampled_from(SIX), OPTIONS), seconds / 2) > 5 * seconds
    assert fuzz(lambda example: read_file(tmp_path, *example), some_file(), seconds / 2) > 5 * seconds


@pytest.mark.parametrize("seconds", SECONDS)
def test_any_store_is_read_or_refused(seconds, store):
    names = sorted(path.name for path in store.iterdir())

    @st.composite
    def some_changes(draw):
        chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
        return {name: some_content(draw, (store / name).read_bytes(), name) for name in chosen}

    assert fuzz(lambda changes: read_store(store, changes), some_changes(), seconds) > 5 * seconds


def some_content(draw, content: bytes, name: str) -> bytes:
    """Damaged bytes, or a manifest that is JSON all the same and says something else."""
    if not name.endswith(".json") or draw(st.booleans()):
        return damaged(draw, content)
    record = json.loads(content)
    place = record
    while isinstance(place, dict | list) and place:
        key = draw(st.sampled_from(sorted(place))) if isinstance(place, dict) else draw(st.integers(0, len(place) - 1))
        if not isinstance(place[key], dict | list) or not place[key] or draw(st.integers(0, 3)) == 0:
            if draw(st.booleans()):
                place[key] = draw(ODD)
            else:
                del place[key]
            break
        place = place[key]
    return json.dumps(record).encode()
