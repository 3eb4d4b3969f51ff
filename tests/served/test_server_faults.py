"""What faults and stops of servers leave of answers: nothing is lost, nothing is there twice."""

import itertools
import re
import time
from contextlib import ExitStack

import pytest
from asking import MANY, QUICK, ROWS, ask, lines
from faulty_server import serving

from flaxdraft.data.server_client import Patience
from flaxdraft.data.talks import FILE
from flaxdraft.errors import InputError

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


def test_requests_that_fail_together_make_one_pause(server, text, tmp_path):
    server.fault = lambda number, prompt: 500 if number < 8 else None
    patient = Patience(timeout=5, first_pause=0.2, longest_pause=60, give_up=20)
    assert ask(MANY[:8], tmp_path / "out", text, [server], in_flight=8, patience=patient) == {"answered": 8}
    assert server.times[8] - server.times[7] < 8  # eight pauses, each twice the one before, are 12.8 s at least


def test_a_server_that_answers_in_between_is_not_given_up(server, text, tmp_path):
    server.fault = lambda number, prompt: 500 if number % 2 else time.sleep(0.05)
    patient = Patience(timeout=5, first_pause=0.01, longest_pause=0.02, give_up=0.2)
    assert ask(MANY[:12], tmp_path / "out", text, [server], in_flight=1, patience=patient) == {"answered": 12}


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


def test_a_busy_server_says_nothing_of_a_conversation(server, text, tmp_path):
    """It is asked again more often than one that fails."""
    last = text.tokenizer.apply_chat_template(MANY[-1]["messages"], add_generation_prompt=True, return_dict=False)
    busy = iter([429] * (2 * QUICK.tries))
    server.fault = lambda number, prompt: next(busy, None) if prompt == last else None
    assert ask([MANY[-1], *MANY[:-1]], tmp_path / "out", text, [server], in_flight=2) == {"answered": len(MANY)}
    assert len(server.asked) == len(MANY) + 2 * QUICK.tries


def test_a_request_that_is_refused_ends_its_conversation_alone(server, text, tmp_path, capsys):
    server.fault = lambda number, prompt: 400 if len(prompt) > 60 else None
    counts = ask(ROWS, tmp_path / "out", text, [server])
    assert counts["with a request that the server refused, ended before it"] == 1
    assert [message["role"] for message in lines(tmp_path / "out")["two"]["messages"]] == ["user", "assistant"]
    assert 'HTTP 400: {"error": "told to"}' in " ".join(capsys.readouterr().out.split())
