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
    """What each process printed: its own evaluation, that of all processes, then the figure of decoding."""
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
    assert all(len(each) == 3 for each in lines)
    return lines


@pytest.fixture(scope="module")
def alone():
    return run(1)[0]


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_add_up(alone, count):
    for *lines, decoded in run(count):
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
