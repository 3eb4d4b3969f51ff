"""What the command is told reaches the servers: options, the key, and how often and how long they are asked."""

import random
import time
from threading import Barrier, Lock

import pytest
from asking import MANY, ROWS, asked, call, lines
from small_chats import ASKS, BODY
from small_targets import DATED, MOOD, target_at

from flaxdraft.data.server_client import KEY


def test_each_request_says_what_the_command_was_told(server, target, text, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    server.key, server.model = "secret", {"id": "its own name"}
    more = ("--model", "its own name", "--temperature", "0.7", "--top-p", "0.8")
    assert call(ROWS, tmp_path / "out", target, [server], *more, "--seed", "5") == 0
    for body in server.asked:
        assert (body["model"], body["max_tokens"], body["top_k"]) == ("its own name", 40, -1)
        assert (body["temperature"], body["top_p"]) == (0.7, 0.8)
        assert body["stop_token_ids"] == text.stop_tokens
    seeds = [body["seed"] for body in server.asked]
    assert len({*seeds}) == len(seeds) == 4
    assert call(ROWS, tmp_path / "again", target, [server], *more, "--seed", "6") == 0
    assert len({body["seed"] for body in server.asked}) == 8


@pytest.mark.parametrize("gives", ["token_ids", "text"])
def test_the_template_gets_its_arguments_and_the_date_that_was_recorded(server, text, tmp_path, gives):
    server.gives, target = gives, target_at(tmp_path / "t", template=DATED + MOOD + BODY + ASKS)
    told = ("--template", "mood=kind")
    assert call(ROWS[:1], tmp_path / "out", target, [server], *told, "--date", "2026-01-31") == 0
    (body,) = server.asked
    assert "Today: 31 Jan 2026 00:00<|im_end|>\nBe kind. " in text.tokenizer.decode(body["prompt"])
    assert call(ROWS[:1], tmp_path / "out", target, [server], *told) == 0  # today is another day
    assert len(lines(tmp_path / "out")) == 1


@pytest.mark.parametrize(("told", "most"), [(("--rows", "3"), 3), ((), 64)])
def test_rows_are_requests_in_flight(server, target, tmp_path, told, most):
    together, lock, counts = Barrier(most, timeout=20), Lock(), [0]

    def crowd(number, prompt):
        with lock:
            counts.append(counts[-1] + 1)
        together.wait()  # so many are there at a time
        time.sleep(0.05)  # and further ones would be seen
        with lock:
            counts.append(counts[-1] - 1)

    server.fault = crowd
    rows = [{"messages": [asked(f"question {i}")]} for i in range(2 * most)]
    assert call(rows, tmp_path / "out", target, [server], *told) == 0
    assert max(counts) == most


def test_an_answer_that_takes_longer_than_the_timeout_is_asked_for_again(server, target, tmp_path, monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda least, most: 0.0)  # no pauses
    server.fault = lambda number, prompt: time.sleep(2) if number == 0 else None
    assert call(MANY[:1], tmp_path / "out", target, [server], "--timeout", "1") == 0
    assert len(server.asked) == 2


def test_bad_rows_are_skipped_where_the_command_is_told_so(server, target, tmp_path, capsys):
    twice = [MANY[0], MANY[0], MANY[1]]
    assert call(twice, tmp_path / "out", target, [server]) == 2
    assert "id 'row 0' stands in" in capsys.readouterr().err
    assert not server.tried
    assert call(twice, tmp_path / "out", target, [server], "--on-bad-row", "skip") == 0
    assert set(lines(tmp_path / "out")) == {"row 0", "row 1"}
