"""The target's own answers in place of a file's: whose they are, resumed or not, and what is left out."""

import json
import re

import numpy as np
import pytest

import flaxdraft.data.regenerate as regenerating
from flaxdraft.data.__main__ import main
from flaxdraft.data.chat_template import ChatTemplate
from flaxdraft.data.conversations import Conversation, read_conversations
from flaxdraft.data.regenerate import regenerate
from flaxdraft.data.talks import FILE, Answering, Asking
from flaxdraft.data.templates import ChatOptions, render
from flaxdraft.decode.generation import generate
from flaxdraft.targets import from_pretrained

USER = "user"
ROWS = [
    {"id": "one", "category": "a", "messages": [{"role": USER, "content": "and the"}]},
    {"id": "two", "messages": [
        {"role": USER, "content": "tell me"}, {"role": "assistant", "content": "nothing of this stays"},
        {"role": USER, "content": "more"},
    ]},
    {"id": "long", "messages": [{"role": USER, "content": "z" * 60}]},
    {"id": "tools", "messages": [
        {"role": USER, "content": "look it up"},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "content": "3"},
    ]},
    {"id": "three", "split": "held_out", "messages": [
        {"role": "system", "content": "brief"}, {"role": USER, "content": "in an inn"},
    ]},
]  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def call(file, out, target, *more):
    return main(["regenerate", str(file), str(out), "--target", str(target), "--dtype", "float32", "--max-new-tokens",
                 "6", "--max-prompt-tokens", "60", *more])  # fmt: skip


def lines(out) -> dict[str, dict]:
    rows = [json.loads(line) for line in (out / FILE).read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


@pytest.fixture(scope="module")
def answered(file, tiny_gguf, tmp_path_factory):
    out = tmp_path_factory.mktemp("answers") / "out"
    assert call(file, out, tiny_gguf) == 0
    return out


@pytest.mark.parametrize(("turns", "sizes"), [(1, [16, 4]), (2, [2] * 10)])
def test_conversations_of_several_turns_reach_the_disk_a_few_at_a_time(monkeypatch, tmp_path, turns, sizes):
    """All of a group are at the same turn: a group that was stopped has none of its longer ones done."""
    groups = []
    monkeypatch.setattr(regenerating, "_answered", lambda group, *_: groups.append(len(group)) or [])
    messages = ({"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}) * turns
    talks = [Conversation(f"row {i}", str(i), None, "train", messages) for i in range(20)]
    regenerate(tmp_path, talks, None, Asking(None, ChatTemplate(), (), Answering()), 2)
    assert groups == sizes


def produced(row):
    return [token for token, on in zip(row["input_ids"], row["loss_mask"], strict=True) if on]


def test_answers_are_the_targets_own(answered, tiny_gguf):
    loaded, rows = from_pretrained(str(tiny_gguf)), lines(answered)
    assert set(rows) == {"one", "two", "three"}
    assert [rows[name]["split"] for name in ("one", "three")] == ["train", "held_out"]
    assert rows["one"]["category"] == "a"
    for name in ("one", "three"):
        source = next(row for row in ROWS if row["id"] == name)
        prompt = loaded.tokenizer.apply_chat_template(source["messages"], add_generation_prompt=True, return_dict=False)
        answer = generate(loaded.model, [prompt], max_new_tokens=6, stop_tokens=loaded.stop_tokens)[0]
        assert rows[name]["input_ids"] == prompt + answer
        assert produced(rows[name]) == answer
        text = loaded.tokenizer.decode(answer, skip_special_tokens=True)
        assert rows[name]["messages"][-1] == {"role": "assistant", "content": text}
    assert "nothing of this stays" not in json.dumps(rows["two"])


def test_a_second_turn_reads_the_first_answer(file, tiny_gguf, tmp_path):
    """The first answer must end for a second turn to follow: its third token is made an end token."""
    loaded = from_pretrained(str(tiny_gguf))
    prompt = loaded.tokenizer.apply_chat_template(
        ROWS[1]["messages"][:1], add_generation_prompt=True, return_dict=False
    )
    free = generate(loaded.model, [prompt], max_new_tokens=6, stop_tokens=())[0]
    conversations = [row for row in read_conversations(file) if row.id == "two"]
    asking = Asking(loaded.tokenizer, ChatTemplate(), [free[2]], Answering(60, 6))
    counts = regenerate(tmp_path, conversations, loaded.model, asking, num_rows=4)
    assert counts["answered"] == 1
    row = lines(tmp_path)["two"]
    assert [message["role"] for message in row["messages"]] == ["user", "assistant", "user", "assistant"]
    context = row["messages"][:-1]
    assert context[1]["content"] == loaded.tokenizer.decode(free[: free.index(free[2]) + 1], skip_special_tokens=True)
    again = loaded.tokenizer.apply_chat_template(context, add_generation_prompt=True, return_dict=False)
    assert row["input_ids"][: len(again)] == again
    # Nothing but what the target produced is ever supervised.
    answer = generate(loaded.model, [again], max_new_tokens=6, stop_tokens=[free[2]])[0]
    assert produced(row)[-len(answer) :] == answer
    assert row["loss_mask"][len(again) :] == [1] * len(answer)


def test_reasons_are_counted(file, tiny_gguf, tmp_path, capsys):
    assert call(file, tmp_path / "out", tiny_gguf) == 0
    text = capsys.readouterr().out
    assert "3 conversations answered" in text
    assert "1 with tool calls, left out" in text
    assert "1 longer than 60 tokens, ended before the turn that was" in text


@pytest.mark.parametrize("sampled", [(), ("--temperature", "1.5", "--seed", "3")])
def test_a_stopped_run_goes_on_to_the_same_answers(file, tiny_gguf, tmp_path, sampled):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert call(file, whole, tiny_gguf, *sampled) == 0
    assert call(file, stopped, tiny_gguf, "--rows", "1", *sampled) == 0
    text = (stopped / FILE).read_bytes()
    first = text.index(b"\n") + 1
    (stopped / FILE).write_bytes(text[: first + 20])  # one line and the beginning of another
    assert call(file, stopped, tiny_gguf, "--rows", "2", *sampled) == 0
    assert lines(stopped) == lines(whole)
    assert (stopped / FILE).read_bytes().startswith(text[:first])


def test_seeds_matter_and_other_settings_are_refused(file, tiny_gguf, tmp_path, capsys):
    for seed in ("3", "4"):
        assert call(file, tmp_path / seed, tiny_gguf, "--temperature", "1.5", "--seed", seed) == 0
    assert lines(tmp_path / "3") != lines(tmp_path / "4")
    assert call(file, tmp_path / "3", tiny_gguf, "--temperature", "1.5", "--seed", "5") == 2
    assert "seed: there 3, here 5" in capsys.readouterr().err


def test_the_file_trains_as_it_is(answered, tiny_gguf):
    tokenizer = from_pretrained(str(tiny_gguf)).tokenizer
    for conversation in read_conversations(answered / FILE):
        rendered = render(tokenizer, conversation, ChatOptions(1000))
        row = lines(answered)[conversation.id]
        np.testing.assert_array_equal(rendered.tokens, row["input_ids"])
        np.testing.assert_array_equal(rendered.assistant, np.asarray(row["loss_mask"], bool))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"input_ids": [1], "loss_mask": [1]}], "row 1: is tokenised already"),
        ([ROWS[0], ROWS[0]], "row 2: id 'one' stands in .* row 1 already"),
        ([{"messages": [{"role": "user", "content": 3}]}], "content: expected text"),
    ],
)
def test_wrong_files(tiny_gguf, tmp_path, capsys, rows, message):
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert call(path, tmp_path / "out", tiny_gguf) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert call(tmp_path / "none.jsonl", tmp_path / "out2", tiny_gguf) == 2
    assert "none.jsonl: no such file" in capsys.readouterr().err
    assert call(path, tmp_path / "out3", tiny_gguf, "--max-new-tokens", "1000") == 2
    assert "more than the target's context of 128" in capsys.readouterr().err


def test_show_marks_what_is_supervised(answered, tiny_gguf, capsys):
    assert main(["show", str(answered / FILE), "--target", str(tiny_gguf), "--rows", "2"]) == 0
    text = capsys.readouterr().out
    rows = list(lines(answered).values())[:2]
    tokenizer = from_pretrained(str(tiny_gguf)).tokenizer
    for row in rows:
        assert f"«{tokenizer.decode(produced(row))}»" in text
    assert f"2 rows, {sum(len(row['input_ids']) for row in rows)} tokens" in text


def test_show_says_when_nothing_is_supervised(file, tiny_gguf, capsys):
    assert main(["show", str(file), "--target", str(tiny_gguf), "--rows", "1"]) == 0
    assert "0 supervised; 1 rows supervise nothing" in capsys.readouterr().out


def test_a_mesh_gives_the_same_answers_and_goes_on_with_those_of_another(answered, file, tiny_gguf, tmp_path, capfd):
    out = tmp_path / "out"
    assert call(file, out, tiny_gguf, "--mesh", "fsdp=2,tensor=2") == 0
    assert lines(out) == lines(answered)
    first, *_ = (out / FILE).read_text().splitlines(keepends=True)
    (out / FILE).write_text(first + first[:9])  # as a run that was stopped leaves it
    assert call(file, out, tiny_gguf, "--mesh", "data=2") == 0
    assert (out / FILE).read_text().startswith(first)
    assert lines(out) == lines(answered)
    assert call(file, tmp_path / "other", tiny_gguf, "--mesh", "fsdp=3") == 2
    assert "mesh.fsdp: 3 devices do not divide embed (266, 32); expected a divisor of 32" in capfd.readouterr().err
