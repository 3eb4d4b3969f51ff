"""vLLM's server answers conversations as the target does when it is loaded here, token by token."""

import json
import socket
import time
import urllib.request

import numpy as np
import other_python
import pytest
from small_targets import VOCAB, rows_at, target_at
from tiny import random_weights
from vllm_runs import MARKS, VLLM, config_json

from flaxdraft.data import server_client
from flaxdraft.data.__main__ import main
from flaxdraft.data.talks import FILE
from flaxdraft.devices.sharding import Sharding
from flaxdraft.files.safetensors_file import save_safetensors
from flaxdraft.nn.precision import Precision
from flaxdraft.targets import llama

pytestmark = MARKS

ENDS = (259, 9)  # <|im_end|>, and a letter that most answers have
SECONDS_TO_START = 400
ROWS = [
    {"id": f"one {i}", "messages": [{"role": "user", "content": f"tell me {i} {'more ' * (i % 5)}"}]} for i in range(20)
] + [
    {"id": f"two {i}", "messages": [
        {"role": "user", "content": f"tell {i}"}, {"role": "assistant", "content": "no"},
        {"role": "user", "content": "more"},
    ]} for i in range(10)
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With `target`, `chats.jsonl`, and in `local` the answers of the loaded target."""
    folder = tmp_path_factory.mktemp("served")
    hf = config_json("LlamaForCausalLM", "llama") | {"vocab_size": VOCAB, "eos_token_id": [*ENDS]}
    target = target_at(folder / "target", **hf)
    config = llama.Config.from_hf(hf)
    weights = random_weights(llama, config, llama.groups(config, Precision(), Sharding.none()))
    written = [*range(94), *ENDS]  # visible ASCII, so that answers are texts
    weights["lm_head.weight"][np.setdiff1d(np.arange(VOCAB), written)] = 0
    save_safetensors(target / "model.safetensors", weights, metadata={"format": "pt"})
    rows_at(folder / "chats.jsonl", *ROWS)
    assert regenerate(folder, "local", "--dtype", "float32") == 0
    assert any(len(row["messages"]) == 4 for row in lines(folder, "local").values())
    return folder


@pytest.fixture(scope="module")
def url(folder):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    with (folder / "log").open("wb") as log:
        arguments = "serve_with_vllm.py", str(folder / "target"), str(port)
        server = other_python.start(VLLM, *arguments, cwd=folder, stdout=log, stderr=log)
        try:
            _wait(server, f"http://127.0.0.1:{port}/health", folder / "log")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait()


def _wait(server, health, log):
    start = time.monotonic()
    while True:
        assert server.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() - start < SECONDS_TO_START, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(health, timeout=5) as reply:
                assert reply.status == 200
                return
        except OSError:
            time.sleep(1)


def regenerate(folder, out, *more):
    return main(["regenerate", str(folder / "chats.jsonl"), str(folder / out), "--target", str(folder / "target"),
                 "--max-prompt-tokens", "180", "--max-new-tokens", "40", *more])  # fmt: skip


def lines(folder, out):
    rows = [json.loads(line) for line in (folder / out / FILE).read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def test_vllm_answers_as_the_loaded_target_does(folder, url, capsys):
    assert regenerate(folder, "served", "--server", url, "--model", "target") == 0
    assert "gives token ids" in capsys.readouterr().out
    assert lines(folder, "served") == lines(folder, "local")


def test_ids_from_logprobs_are_the_same(folder, url, capsys, monkeypatch):
    """As versions before `return_token_ids` give them."""
    second = [server_client.ways(ENDS)[1]]
    monkeypatch.setattr(server_client, "ways", lambda stop_tokens: second)
    assert regenerate(folder, "logprobs", "--server", url, "--model", "target") == 0
    assert "gives token ids" in capsys.readouterr().out
    assert lines(folder, "logprobs") == lines(folder, "local")


def test_texts_are_the_same_tokens_again(folder, url, capsys, monkeypatch):
    third = [server_client.ways(ENDS)[2]]
    monkeypatch.setattr(server_client, "ways", lambda stop_tokens: third)
    assert regenerate(folder, "texts", "--server", url, "--model", "target") == 0
    assert "gives text alone" in capsys.readouterr().out
    assert lines(folder, "texts") == lines(folder, "local")
