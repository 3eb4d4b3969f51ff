"""Answers from servers: whose tokens they are, what faults and stops leave of them, and what is refused in one line."""

import itertools
import json
import random
import re
import shutil
import socket
import time
from contextlib import ExitStack

import pytest
from faulty_server import MODEL, OPENAIS, TENSORRTS, Said, serving
from small_targets import rows_at, target_at

from flaxdraft.data.__main__ import main
from flaxdraft.data.chat_template import ChatTemplate
from flaxdraft.data.conversations import read_conversations
from flaxdraft.data.served_answers import HOPELESS, Served, answer_from_servers
from flaxdraft.data.server_client import KEY, Patience
from flaxdraft.data.talks import FILE, Answering, Asking, answerable
from flaxdraft.data.templates import ChatOptions, render
from flaxdraft.errors import InputError
from flaxdraft.stages.claims import RECORD
from flaxdraft.targets.text_side import open_text_side

QUICK = Patience(timeout=5, first_pause=0.01, longest_pause=0.05, give_up=0.5, tries=4)
USER = "user"


def asked(text):
    return {"role": USER, "content": text}


ROWS = [
    {"id": "one", "category": "a", "messages": [asked("and the")]},
    {"id": "two", "messages": [asked("tell me"), {"role": "assistant", "content": "nothing of this"}, asked("more")]},
    {"id": "long", "messages": [asked("z" * 200)]},
    {"id": "three", "split": "held_out", "messages": [{"role": "system", "content": "brief"}, asked("é <|im_end|>")]},
]
MANY = [{"id": f"row {i}", "messages": [asked(f"question {i}")]} for i in range(30)]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """Its weights are not there."""
    path = target_at(tmp_path_factory.mktemp("target") / "t")
    (path / "model.safetensors").unlink()
    return path


@pytest.fixture(scope="module")
def text(target):
    opened = open_text_side(str(target))
    return Asking(opened.tokenizer, ChatTemplate(), opened.stop_tokens, Answering(150, 40))


@pytest.fixture(scope="module")
def answer(text):
    """What the servers' model says: something that depends on all of its prompt."""

    def said(prompt):
        words = f"After {len(prompt)}: {sum(prompt) % 97} <é>"
        return Said([*text.tokenizer(words, add_special_tokens=False)["input_ids"], text.stop_tokens[0]], words)

    return said


@pytest.fixture
def server(answer):
    with serving(answer) as server:
        yield server


def call(rows, out, target, servers, *more):
    file = rows_at(out.parent / "chats.jsonl", *rows)
    urls = [part for server in servers for part in ("--server", getattr(server, "url", server))]
    return main(["regenerate", str(file), str(out), "--target", str(target), *urls, "--model", MODEL,
                 "--max-prompt-tokens", "150", "--max-new-tokens", "40", *more])  # fmt: skip


def ask(rows, out, text, servers, in_flight=4, patience=QUICK, num_tokens=300):
    """As `call` does, with less patience."""
    out.mkdir(exist_ok=True)
    file = rows_at(out.parent / "chats.jsonl", *rows)
    conversations = answerable(read_conversations(file), text.tokenizer, text.template, None)
    served = Served([getattr(one, "url", one) for one in servers], MODEL, in_flight, patience)
    return answer_from_servers(out, conversations, served, text, num_tokens)


def lines(out) -> dict[str, dict]:
    rows = [json.loads(line) for line in (out / FILE).read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def nowhere() -> str:
    """Where nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}/v1"


def test_answers_are_what_the_server_said(server, target, text, answer, tmp_path, capsys):
    assert call(ROWS, tmp_path / "out", target, [server], "--temperature", "0.7", "--seed", "5") == 0
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
    for body in server.asked:
        assert body["temperature"] == 0.7
        assert body["stop_token_ids"] == text.stop_tokens
        assert (body["top_k"], body["max_tokens"], body["model"]) == (-1, 40, MODEL)
    assert len({body["seed"] for body in server.asked}) == len(server.asked) == 4
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
        other.gives, other.fields = gives, fields
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


FAULTS = ["hang", "drop", "cut", "no JSON", 429, 500, 503, (429, {"Retry-After": "0"}), {"choices": []}, [], {
    "choices": [{"text": "half", "finish_reason": "abort"}]
}, {"choices": [{"text": None, "finish_reason": "stop"}]}]  # fmt: skip


def test_faults_lose_nothing_and_double_nothing(answer, text, tmp_path):
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(answer)) for _ in range(3)]
        ask(MANY, tmp_path / "whole", text, servers[:1])
        faults = iter([part for fault in FAULTS for part in (fault, None)])
        for server in servers[1:]:
            server.fault = lambda number, prompt: next(faults, None)
        patient = Patience(timeout=0.3, first_pause=0.01, longest_pause=0.05, give_up=20, tries=99)
        counts = ask(MANY, tmp_path / "out", text, servers[1:], patience=patient)
    assert counts == {"answered": len(MANY)}
    assert lines(tmp_path / "out") == lines(tmp_path / "whole")
    assert sum(len(server.asked) for server in servers[1:]) >= len(MANY) + len(FAULTS)
    assert all(len(server.asked) > 5 for server in servers[1:])


def test_a_server_that_asks_for_time_gets_it(server, text, tmp_path):
    server.fault = lambda number, prompt: (429, {"Retry-After": "1"}) if number == 0 else None
    assert ask(MANY[:3], tmp_path / "out", text, [server], in_flight=1) == {"answered": 3}
    first, second, *_ = server.times
    assert second - first >= 1


def test_a_date_to_come_back_at(server, text, tmp_path):
    past = {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}
    server.fault = lambda number, prompt: [(429, past), (503, {"Retry-After": "soon"})][number] if number < 2 else None
    assert ask(MANY[:3], tmp_path / "out", text, [server], in_flight=1) == {"answered": 3}
    assert len(server.asked) == 5


def test_pauses_grow(server, text, tmp_path):
    server.fault = lambda number, prompt: 500 if number < 4 else None
    patient = Patience(timeout=5, first_pause=0.04, longest_pause=0.16, give_up=20)
    assert ask(MANY[:1], tmp_path / "out", text, [server], patience=patient) == {"answered": 1}
    pauses = [later - sooner for sooner, later in itertools.pairwise(server.times)]
    for pause, least in zip(pauses, (0.02, 0.04, 0.08, 0.08), strict=True):
        assert pause >= least


def test_a_stopped_run_goes_on(answer, text, tmp_path):
    """The server goes away in the middle; a line is cut, as a process that was killed leaves it."""
    out = tmp_path / "out"
    with serving(answer) as whole:
        ask(MANY, tmp_path / "whole", text, [whole])
    with serving(answer) as first:
        first.fault = lambda number, prompt: "drop" if number >= 10 else None
        with pytest.raises(InputError, match=rf"--server {first.url}: .*; no server has answered for 0 s. What was"):
            ask(MANY, out, text, [first])
    there = lines(out)
    assert 5 < len(there) <= 10
    stood = (out / FILE).read_bytes()
    (out / FILE).write_bytes(stood + stood[:50])
    with serving(answer) as second:
        counts = ask(MANY, out, text, [second])
        assert len(second.asked) == len(MANY) - len(there)
        assert counts == {"answered": len(MANY)}
        assert (out / FILE).read_bytes().startswith(stood)
        assert lines(out) == lines(tmp_path / "whole")
        second.asked.clear(), second.tried.clear()
        assert ask(MANY, out, text, [second]) == counts
        assert not second.asked
        assert not second.tried


def test_servers_share_the_work_and_one_may_go_away(answer, text, tmp_path, capsys):
    with serving(answer) as one, serving(answer) as two, serving(answer) as three:
        two.fault = lambda number, prompt: "drop" if number > 3 else None
        three.fault = lambda number, prompt: 500
        one.fault = lambda number, prompt: time.sleep(0.05)  # the others are given up in the meantime
        assert ask(MANY, tmp_path / "out", text, [one, two, three], in_flight=2) == {"answered": len(MANY)}
        assert len(one.asked) >= len(MANY) - 4
        assert len(two.asked) > 3
    said = capsys.readouterr().out
    for server in two, three:
        assert re.search(rf"{server.url}: .*; given up", " ".join(said.split()))


def test_a_conversation_that_a_server_fails_at_is_left_out(server, text, tmp_path):
    bad = text.tokenizer.apply_chat_template(MANY[3]["messages"], add_generation_prompt=True, return_dict=False)
    server.fault = lambda number, prompt: 500 if prompt == bad else None
    counts = ask(MANY, tmp_path / "out", text, [server], in_flight=2)
    assert counts == {
        "answered": len(MANY) - 1, "not answered in 4 tries, left out until the command is run again": 1
    }  # fmt: skip
    server.fault = lambda number, prompt: None
    assert ask(MANY, tmp_path / "out", text, [server]) == {"answered": len(MANY)}


def test_a_request_that_is_refused_ends_its_conversation_alone(server, text, tmp_path, capsys):
    server.fault = lambda number, prompt: 400 if len(prompt) > 60 else None
    counts = ask(ROWS, tmp_path / "out", text, [server])
    assert counts["with a request that the server refused, ended before it"] == 1
    assert [message["role"] for message in lines(tmp_path / "out")["two"]["messages"]] == ["user", "assistant"]
    assert 'HTTP 400: {"error": "told to"}' in " ".join(capsys.readouterr().out.split())


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


def test_another_model_is_found_out(server, answer, text, tmp_path):
    server.answer = lambda prompt: answer(prompt)._replace(text="something else")
    with pytest.raises(InputError, match=rf"none of its first {HOPELESS} answers can be used \(tokens do not say"):
        ask(MANY, tmp_path / "out", text, [server])


def test_a_token_beyond_the_vocabulary_ends_the_run_and_loses_nothing(server, answer, target, tmp_path, capsys):
    server.answer = lambda prompt: answer(prompt)._replace(ids=[300]) if len(server.asked) > 9 else answer(prompt)
    assert call(MANY, tmp_path / "out", target, [server], "--rows", "2") == 2
    said = capsys.readouterr().err
    assert f"flaxdraft: --server {server.url}: token 300 in an answer, the target has 0 to 299; give the" in said
    assert said.count("\n") == 1
    assert 5 < len(lines(tmp_path / "out")) < 11
    server.answer = answer
    assert call(MANY, tmp_path / "out", target, [server]) == 0
    assert len(lines(tmp_path / "out")) == len(MANY)


def test_wrong_servers(server, target, tmp_path, capsys, monkeypatch):
    def refused(servers, *more):
        assert call(ROWS, tmp_path / "out", target, servers, *more) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert not (tmp_path / "out" / FILE).exists()
        return said

    assert "expected http://HOST:PORT/v1" in refused(["http://host:port/v1"])
    gone = nowhere()
    assert f"--server {gone}: cannot be reached" in refused([server, gone])
    assert "correct the address" in refused([server.url.removesuffix("/v1")])
    assert f"--model: {server.url} has no 'x', but: org/target, another" in refused([server], "--model", "x")
    assert "--mesh and --dtype are for a target that is loaded here" in refused([server], "--dtype", "float32")
    server.model |= {"max_model_len": 189}
    assert f"found 190 together, more than the 189 tokens that {server.url}" in refused([server])
    server.model |= {"max_model_len": 190}
    server.key = "k"
    assert f"give its key in the environment variable {KEY}" in refused([server])
    monkeypatch.setenv(KEY, "k")
    assert not server.tried  # nothing was asked of a server that is not right
    monkeypatch.setattr(random, "uniform", lambda least, most: 0.0)  # no pauses
    server.first_fault = 500
    assert re.search(rf"--server {server.url}: HTTP 500: .* 4 times; look at what the server says", refused([server]))
    server.first_fault = {"choices": []}
    assert "its answer has no choices, 4 times" in refused([server])
    server.first_fault = 422
    assert f"--server {server.url}: HTTP 422: " in refused([server])
    server.first_fault = {"choices": [{"prompt_token_ids": [1, 2], "token_ids": [3], "text": ""}]}
    assert "reads another prompt than it was given (2 tokens, not" in refused([server])
    server.first_fault = {"choices": [{"text": ""}], "usage": {"prompt_tokens": 3}}
    assert "reads another prompt than it was given (3 tokens, not" in refused([server])
    server.first_fault = None
    assert call(ROWS, tmp_path / "out", target, [server]) == 0


def test_wrong_arguments(target, tmp_path, capsys, monkeypatch):
    for url in ("localhost:8000", "ftp://host/v1", "http:///v1", ""):
        with pytest.raises(SystemExit):
            call(ROWS, tmp_path / "out", target, [url])
        assert f"--server: found {url!r}, expected http://HOST:PORT/v1" in capsys.readouterr().err
    file, out = str(rows_at(tmp_path / "chats.jsonl", *ROWS)), str(tmp_path / "out")
    both = ["regenerate", file, out, "--target", str(target)]
    assert main([*both, "--server", "http://host/v1"]) == 2
    assert "--server: give --model NAME, too" in capsys.readouterr().err
    assert main([*both, "--model", "x"]) == 2
    assert "--model: names a server's model; give --server, too, or leave it out" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert main([*both, "--server", "http://host/v1", "--model", "x"]) == 2
    assert "--server: found several processes; start this command once" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_is_of_one_model_and_one_way_of_answering(server, target, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(ROWS, out, target, [server]) == 0
    server.model = {"id": "other"}
    assert call(ROWS, out, target, [server], "--model", "other") == 2
    assert f"model: there {MODEL!r}, here 'other'" in capsys.readouterr().err
    assert call(ROWS, out, target, [server], "--top-p", "0.9") == 2
    assert "top_p: there 1.0, here 0.9" in capsys.readouterr().err


def test_a_target_without_a_size(tmp_path, target, capsys):
    config = json.loads((target / "config.json").read_text())
    other = tmp_path / "t"
    shutil.copytree(target, other)
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": "many"}))
    assert call(ROWS, tmp_path / "out", other, [nowhere()]) == 2
    assert "config.json: vocab_size: found 'many', expected the number of tokens" in capsys.readouterr().err
    # Families that are not known here, and those with a part for pictures, are asked like others.
    del config["vocab_size"]
    unknown = {"model_type": "new", "architectures": ["NewForCausalLM"], "text_config": {"vocab_size": 300}}
    (other / "config.json").write_text(json.dumps(config | unknown))
    assert open_text_side(str(other)).num_tokens == 300
