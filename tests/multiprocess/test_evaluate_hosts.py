"""Evaluation by several processes gives what one gives, on each of them."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from closeness import assert_close

SCRIPT = Path(__file__).with_name("evaluate_part.py")


def run(count: int) -> list[list[dict]]:
    """What each process printed: its own evaluation, that of all processes, the figure of decoding, and lines of
    Domino's figures, which evaluate_part.py describes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, SCRIPT, *([str(i), str(count), str(port)] if count > 1 else [])],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(count)
    ]  # fmt: skip
    ended = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * count, ended
    lines = [[json.loads(line) for line in out.splitlines() if line.startswith("{")] for out, _ in ended]
    assert all(len(each) == (6 if count == 1 else 4) for each in lines)
    return lines


@pytest.fixture(scope="module")
def alone():
    return run(1)[0]


def of_domino(lines: list[dict]) -> list[dict]:
    return [line["scalars"] for line in lines if "scalars" in line]


def others(lines: list[dict]) -> list[dict]:
    return [line for line in lines if "scalars" not in line]


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=(pytest.mark.slow, pytest.mark.exhaustive))])
def test_processes_add_up(alone, count):
    printed = run(count)
    assert_scalars_are_of_sums(of_domino(alone), [of_domino(lines) for lines in printed])
    alone = others(alone)
    for *lines, decoded in map(others, printed):
        assert decoded == alone[2]
        assert decoded["decoded"] > 1.5
        for line in lines:
            for name in alone[0]:
                want = alone[0][name]
                if name == "ratios":
                    assert_close(line[name], want, ulp=16)
                elif name in ("loss", "loss_J", "expected_accept_J"):
                    assert_close(line[name], want, ulp=8, dtype=np.float32)
                else:
                    assert line[name] == want, name


def assert_scalars_are_of_sums(alone: list[dict], together: list[list[dict]]) -> None:
    """Of answers that no batch size goes into: hits and tokens of all batches and processes are added up before one is
    divided by the other. The mean over parts, or over slots, is another number."""
    whole, *parts = alone
    for name, hits in (("token_accuracy", "hits"), ("base_token_accuracy", "base_hits")):
        assert whole[name] == sum(whole[hits]) / sum(whole["tokens"])
        by_slot = np.divide(whole[hits], whole["tokens"])
        for means in (by_slot, [part[name] for part in parts]):
            assert abs(np.mean(means) / whole[name] - 1) > 0.001
    assert 0 < whole["base_token_accuracy"] < whole["token_accuracy"] < 1
    assert together == [[whole]] * len(together)
