"""What commands make of a file of rows."""

import gzip
import json

import pytest
from small_chats import ASKS, BODY, HELLO, HI
from small_targets import packed, rows_at, said, target_at

from flaxdraft.data.__main__ import main
from flaxdraft.data.bad_rows import BadRows
from flaxdraft.data.conversations import read_conversations

GOOD = {"messages": [HI, HELLO]}


def said_wrong(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_all_bad_rows_of_a_file_are_counted(tmp_path, capsys):
    path = target_at(tmp_path / "t")
    bad = [{"messages": []}, {"text": "x"}, *[{"messages": [{"role": "bot", "content": str(i)}]} for i in range(10)]]
    file = rows_at(tmp_path / "c.jsonl", GOOD, *bad, GOOD)
    file.write_text(file.read_text() + "{\n")
    assert main(["show", str(file), "--target", str(path)]) == 2
    error = capsys.readouterr().err
    assert "13 bad rows; mend them, or leave them out with --on-bad-row skip" in error
    assert error.count("\n  /") == 10
    assert "and 3 more" in error
    assert main(["show", str(file), "--target", str(path), "--on-bad-row", "skip"]) == 0
    out = said(capsys)
    assert "2 rows," in out
    assert "13 bad rows left out" in out


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_is_read(tmp_path, capsys, indent):
    file, path = tmp_path / "c.json", target_at(tmp_path / "t")
    file.write_text(json.dumps([GOOD, {**GOOD, "tools": ""}], indent=indent))
    assert main(["show", str(file), "--target", str(path)]) == 0
    assert "2 rows," in said(capsys)
    file.write_text(json.dumps([GOOD], indent=1)[:-3])
    assert main(["show", str(file), "--target", str(path)]) == 2
    assert "begins like a JSON array and is none" in capsys.readouterr().err


@pytest.mark.parametrize("num", [1, 2])
def test_an_object_over_many_lines_is_said(tmp_path, capsys, num):
    file, path = tmp_path / "c.json", target_at(tmp_path / "t")
    file.write_text("\n".join(json.dumps(row, indent=1) for row in [GOOD] * num))
    assert main(["show", str(file), "--target", str(path)]) == 2
    assert "begins with a JSON object over many lines; write one row a line" in said_wrong(capsys)
    for broken in ('{"messages": [\n', json.dumps(GOOD) * 2 + "\n", json.dumps(GOOD) + ",\n"):
        file.write_text(broken + json.dumps(GOOD))  # the row alone is bad
        assert main(["show", str(file), "--target", str(path)]) == 2
        assert "1 bad row" in said_wrong(capsys)
        assert main(["show", str(file), "--target", str(path), "--on-bad-row", "skip"]) == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(b"{}", mtime=0), "is compressed (gzip); unpack it"), (b"PK\x03\x04...", "is a zip archive"),
        (b"PAR1...", "is a Parquet file; give it a name that ends in .parquet"), (b"[]", "holds no conversations"),
        (b"\n [\n]\n", "holds no conversations"), (b"{}", "row 1: expected one of messages, "),
        (b"{}", "with loss_mask; found nothing"),
    ],
)  # fmt: skip
def test_files_of_something_else(tmp_path, capsys, content, words):
    file, path = tmp_path / "c.jsonl", target_at(tmp_path / "t")
    file.write_bytes(content)
    assert main(["show", str(file), "--target", str(path)]) == 2
    assert words in said_wrong(capsys)


def test_a_picture_that_cannot_be_written(tmp_path, capsys):
    file, path = rows_at(tmp_path / "c.jsonl", GOOD), target_at(tmp_path / "t")
    assert main(["check", str(file), "--target", str(path), "--out", str(file / "lengths.png")]) == 2
    assert f"--out: cannot write {file / 'lengths.png'}" in said_wrong(capsys)
    assert main(["check", str(file), "--target", str(path), "--out", str(tmp_path / "lengths.of.it")]) == 0
    assert (tmp_path / "lengths.of.it").read_bytes().startswith(b"\x89PNG")


def test_halves_of_characters_are_named_once(tmp_path):
    bad = BadRows("c.jsonl")
    file = rows_at(tmp_path / "c.jsonl", {"messages": [{**HI, "content": "\ud83d"}]}, GOOD)
    assert len([*read_conversations(file, bad)]) == 1
    assert bad.messages[0].count("row 1: not text in JSON") == 1


@pytest.mark.parametrize("indent", [None, 1])
def test_items_of_an_array_that_are_no_objects(tmp_path, indent):
    file, bad = tmp_path / "c.json", BadRows("c.json")
    file.write_text(json.dumps([GOOD, None, "x", GOOD], indent=indent))
    assert len([*read_conversations(file, bad)]) == 2
    assert bad.messages == [
        f"{file} row {number}: expected an object, found {kind}" for number, kind in ((2, "NoneType"), (3, "str"))
    ]


SILENT = "{% for m in messages if m.role not in ('system', 'tool') %}" + BODY.removeprefix("{% for m in messages %}")
THOUGHT = {**HELLO, "content": "<think>say yes</think>yes"}


@pytest.mark.parametrize(
    ("body", "row", "lost"),
    [
        (SILENT, {"messages": [{"role": "system", "content": "hi"}, HI, HELLO]}, "a system says"),
        (SILENT, {"messages": [HI, HELLO, {"role": "tool", "content": "hello"}, HELLO]}, "a tool says"),
        (BODY, {"messages": [HI, {**HELLO, "content": "hi hi"}, HI, {**HELLO, "content": "<think>hi</think>hi"}]}, ""),
        (BODY.replace("m['content']", "m['content'].split('</think>')[-1]"),
         {"messages": [HI, THOUGHT, HI, HELLO]}, "reasoning of an assistant"),
        (BODY.replace("m['content']", "(m['content'] | tojson if m.role == 'tool' else m['content'])"),
         {"messages": [HI, HELLO, {"role": "tool", "content": '{"a": "hi"}'}, HELLO]}, ""),
        (BODY, {"messages": [HI, {**HELLO, "content": ""}, {**HI, "content": "aaa"}, {**HELLO, "content": "aa"}]}, ""),
    ],
)  # fmt: skip
def test_what_a_template_leaves_out_is_found_though_others_say_the_same(tmp_path, capsys, body, row, lost):
    path, file = target_at(tmp_path / "t", body + ASKS), rows_at(tmp_path / "c.jsonl", row)
    assert main(["check", str(file), "--target", str(path)]) == int(bool(lost) and "reasoning" not in lost)
    out = packed(said(capsys))
    assert (packed("dropped") in out) == bool(lost)
    assert packed(lost) in out


def test_a_file_is_checked_in_one_table(tmp_path, capsys):
    path = target_at(tmp_path / "t", BODY.replace("m['content']", "m['content'].split('</think>')[-1]") + ASKS)
    picture = tmp_path / "lengths.png"
    file = rows_at(tmp_path / "c.jsonl", GOOD, {"messages": [HI]}, {"messages": [HI, HELLO, HI]})
    call = ["check", str(file), "--target", str(path)]
    assert main([*call, "--out", str(picture)]) == 0
    out = said(capsys)
    for words in ("rows 3, 0 of them bad", "tokens 76", "supervised 12, 15.8% of all", "256 tokens hold 100.0%",
                  f"supervise nothing 1 rows, first {file} row 2", "16 - 31 1 ###"):  # fmt: skip
        assert packed(words) in packed(out), (words, out)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*call, "--max-silent", "0.1"]) == 1
    thought = {"messages": [HI, {**HELLO, "content": "<think>hm</think>yes"}]}
    lost = {"messages": [{**HI, "content": "a</think>"}, HELLO]}
    rows_at(file, GOOD, {"messages": []}, {"messages": []}, thought, lost)
    capsys.readouterr()
    assert main(call) == 1
    out = said(capsys)
    for words in (
        f"bad 2 x {file} row 2: messages: expected a non-empty list",
        f"dropped reasoning of an assistant, by the chat template, in 1 rows, first {file} row 4",
        f"dropped what a user says, by the chat template, in 1 rows, first {file} row 5",
    ):
        assert packed(words) in packed(out), (words, out)
    assert main([*call, "--on-bad-row", "skip"]) == 1  # what a user said is lost all the same
