"""Answers from servers: whose tokens they are, and which are left out since their tokens are not known."""

import copy
import dataclasses
import json

import pytest
from asking import MANY, ROWS, ask, call, lines
from faulty_server import MODEL, OPENAIS, TENSORRTS, Said, serving
from tokenizers import normalizers

from flaxdraft.data.conversations import read_conversations
from flaxdraft.data.served_answers import HOPELESS
from flaxdraft.data.talks import FILE
from flaxdraft.data.templates import ChatOptions, render
from flaxdraft.stages.claims import RECORD


def test_answers_are_what_the_server_said(server, target, text, answer, tmp_path, capsys):
    assert call(ROWS, tmp_path / "out", target, [server], "--temperature", "0.7", "--seed", "5") == 0
    assert len(server.asked) == 4
    rows = lines(tmp_path / "out")
    assert set(rows) == {"one", "two", "three"}
    for row in ROWS[0], ROWS[3]:
        prompt = text.tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, return_dict=False)
        said, found = answer(prompt), rows[row["id"]]
        assert found["input_ids"] == prompt + said.ids
        assert found["loss_mask"] == [0] * len(prompt) + [1] * len(said.ids)
        assert found["messages"] == [*row["messages"], {"role": "assistant", "content": said.text}]
    assert [rows[name]["category"] for name in ("one", "two")] == ["a", ""]
    assert rows["three"]["split"] == "held_out"
    first, second = (message["content"] for message in rows["two"]["messages"][1::2])
    assert sum(rows["two"]["loss_mask"]) == len(text.tokenizer(first + second)["input_ids"]) + 2
    said = capsys.readouterr().out
    assert f"{server.url}: gives token ids\n" in said
    assert "3 conversations answered" in said
    assert "1 longer than 150 tokens, ended before the turn that was" in said
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert (record["model"], record["temperature"], record["seed"]) == (MODEL, 0.7, 5)


def test_the_file_trains_as_it_is(server, text, tmp_path):
    ask(ROWS, tmp_path / "out", text, [server])
    for conversation in read_conversations(tmp_path / "out" / FILE):
        row = lines(tmp_path / "out")[conversation.id]
        assert render(text.tokenizer, conversation, ChatOptions(1000)).tokens.tolist() == row["input_ids"]


@pytest.mark.parametrize("gives", ["content", "tagged", "text"])
@pytest.mark.parametrize("fields", [None, TENSORRTS, OPENAIS], ids=["any", "TensorRT-LLM's", "OpenAI's"])
def test_servers_of_all_kinds_give_the_same(answer, text, tmp_path, gives, fields):
    with serving(answer) as plain, serving(answer) as other:
        other.gives, other.fields, other.counts = gives, fields, fields is not OPENAIS
        ask(ROWS, tmp_path / "plain", text, [plain])
        ask(ROWS, tmp_path / "other", text, [other])
    assert lines(tmp_path / "plain") == lines(tmp_path / "other")
    sent = {*other.asked[0]}
    assert ("logprobs" in sent) == (gives != "text" and fields is None)
    assert other.asked[0].get("top_k") == {None: -1, TENSORRTS: 0, OPENAIS: None}[fields]
    assert sent <= (fields or sent)


def test_greedy_requests_have_no_seed(server, text, tmp_path):
    ask(ROWS[:1], tmp_path / "out", text, [server])
    assert "seed" not in server.asked[0]


def test_an_answer_that_is_not_done_ends_its_conversation(answer, text, tmp_path):
    def cut(prompt):
        said = answer(prompt)
        return Said(said.ids[:5], text.tokenizer.decode(said.ids[:5]), "length")

    for gives in ("token_ids", "text"):
        with serving(cut) as server:
            server.gives = gives
            counts = ask(ROWS, tmp_path / gives, text, [server])
        assert counts["not done after 40 tokens, ended there"] == 3
        rows = lines(tmp_path / gives)
        assert {sum(row["loss_mask"]) for row in rows.values()} == {5}
        assert [message["role"] for message in rows["two"]["messages"]] == ["user", "assistant"]


WRONG = {
    "no text": ("text", lambda said: Said([7], "", "length"), "tokens are none"),
    "no tokens": ("token_ids", lambda said: Said([], "", "length"), "tokens are none"),
    "other ids": ("token_ids", lambda said: said._replace(ids=[9, *said.ids[1:]]), "tokens do not say its text"),
    "a special token is left out": (
        "text", lambda said: said._replace(ids=[260, *said.ids]), "text is tokenised otherwise than the server did",
    ),
    "half a letter": ("text", lambda said: said._replace(text="\ufffd" + said.text), "text has halves of letters"),
    "a text whose first token merges with the prompt": (
        "text", lambda said: said._replace(text="\t\t" + said.text), "text cannot be told from its prompt",
    ),
    "a text of another tokenizer": (
        "text", lambda said: said._replace(ids=[*said.ids[:3], *said.ids]), "text is tokenised otherwise than the",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_answers_whose_tokens_are_not_known_are_left_out(answer, text, tmp_path, name):
    gives, spoil, why = WRONG[name]
    with serving(answer) as plain, serving(answer) as server:
        ask(MANY, tmp_path / "whole", text, [plain])
        server.gives = gives
        server.answer = lambda prompt: spoil(answer(prompt)) if prompt[-15] % 2 else answer(prompt)
        counts = ask(MANY, tmp_path / "out", text, [server], in_flight=1)
    whole, found = lines(tmp_path / "whole"), lines(tmp_path / "out")
    assert {name: whole[name] for name in found} == found
    assert 0 < len(found) < len(whole)
    (left_out,) = {*counts} - {"answered"}
    assert why in left_out
    assert counts[left_out] == len(whole) - len(found)


def test_special_tokens_in_a_text_are_tokens_again(answer, text, tmp_path):
    """Reasoning and tool calls are marked so in many models."""
    special = text.tokenizer.convert_tokens_to_ids("<|im_start|>")

    def marked(prompt):
        said = answer(prompt)
        return Said([special, *said.ids], "<|im_start|>" + said.text)

    with serving(marked) as server:
        server.gives = "text"
        ask(MANY[:2], tmp_path / "out", text, [server])
    for row in lines(tmp_path / "out").values():
        assert row["input_ids"][row["loss_mask"].index(1)] == special


def test_a_text_that_its_tokenizer_changes_is_left_out(server, answer, text, tmp_path):
    tokenizer = copy.deepcopy(text.tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    server.gives, server.counts = "text", False
    server.answer = lambda prompt: answer(prompt)._replace(text="e\u0301")
    counts = ask(MANY[:3], tmp_path / "out", dataclasses.replace(text, tokenizer=tokenizer), [server])
    assert counts == {
        "answered": 0,
        "with an answer whose text reads otherwise once it is tokenised, ended before it": 3,
    }


def test_unused_answers_end_no_run_in_which_others_are_used(server, answer, text, tmp_path):
    server.answer = lambda prompt: answer(prompt)._replace(**{"text": "else"} if len(server.asked) > 1 else {})
    counts = ask(MANY, tmp_path / "out", text, [server], in_flight=1)
    assert counts["answered"] == 1
    assert counts["with an answer whose tokens do not say its text, ended before it"] == len(MANY) - 1 > HOPELESS


@pytest.mark.parametrize("named", [{"stop_reason": 9}, {"matched_stop": 9}, {"stop_reason": None}, {}])
def test_the_token_that_ended_a_text_is_the_one_that_the_server_names(server, text, tmp_path, named):
    server.fault = lambda number, prompt: {"choices": [{"text": "and", "finish_reason": "stop", **named}]}
    both = dataclasses.replace(text, stop_tokens=[*text.stop_tokens, 9])
    ask(MANY[:1], tmp_path / "out", both, [server])
    (row,) = lines(tmp_path / "out").values()
    assert row["input_ids"][-1] == (9 if 9 in named.values() else text.stop_tokens[0])
