"""Servers, arguments and folders that do not go together are refused in one line."""

import json
import random
import re
import shutil
import socket

import pytest
from asking import MANY, ROWS, ask, call, lines
from faulty_server import MODEL
from small_chats import Kind
from small_targets import rows_at, target_at

from flaxdraft.data.__main__ import main
from flaxdraft.data.served_answers import HOPELESS
from flaxdraft.data.server_client import KEY
from flaxdraft.data.talks import FILE
from flaxdraft.errors import InputError
from flaxdraft.targets.text_side import open_text_side


def nowhere() -> str:
    """Where nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}/v1"


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
    assert call(ROWS[:2], out, target, [server]) == 2
    assert "conversations: there" in capsys.readouterr().err
    assert call(ROWS, out, target_at(tmp_path / "t", kind=Kind(merges=False)), [server]) == 2
    said = capsys.readouterr().err
    assert "target: there" in said
    assert "tokenizer: there" in said


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
