"""The launcher of several processes on one host, with a stand-in for `python`."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "experiments" / "launch" / "one_host.sh"
# Notes what it was started with; ends with the code that CODES has for its process and how often it was started.
PYTHON = """#!/usr/bin/env bash
trap 'sleep 0.2; exit 75' TERM
who="$FLAXDRAFT_PROCESS_ID of $FLAXDRAFT_NUM_PROCESSES at $FLAXDRAFT_COORDINATOR on $CUDA_VISIBLE_DEVICES"
echo "$who: $*" >> "$NOTES"
times=$(grep -c "^$FLAXDRAFT_PROCESS_ID of" "$NOTES")
while [ -n "${WAITS:-}" ]; do sleep 0.05; done
eval "codes=(\\$CODES_$FLAXDRAFT_PROCESS_ID)"
exit ${codes[$((times - 1))]}
"""


@pytest.fixture
def start(tmp_path):
    """start(codes of process 0, codes of process 1, more of the environment)"""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(PYTHON)
    (tmp_path / "bin" / "python").chmod(0o755)

    def start(first: str, second: str, **more: str) -> subprocess.Popen:
        environment = os.environ | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "NOTES": str(tmp_path / "notes"), "PORT": "77",
            "CODES_0": first, "CODES_1": second, **more,
        }  # fmt: skip
        return subprocess.Popen([SCRIPT, "2", "run.yaml", "mesh.fsdp=2"], env=environment, stderr=subprocess.PIPE)

    return start


@pytest.mark.parametrize(
    ("codes", "times", "end"),
    [(("0", "0"), 1, 0), (("75 0", "134 0"), 2, 0), (("75", "2"), 1, 2), (("1", "75"), 1, 1)],
)
def test_it_starts_all_again_while_they_may_go_on(start, tmp_path, codes, times, end):
    process = start(*codes)
    process.communicate(timeout=30)
    assert process.returncode == end
    notes = sorted((tmp_path / "notes").read_text().splitlines())
    same = "of 2 at localhost:77 on"
    command = "-m flaxdraft.train --config run.yaml mesh.fsdp=2"
    assert notes == [f"0 {same} 0: {command}"] * times + [f"1 {same} 1: {command}"] * times


def test_a_run_that_is_asked_to_stop_is_not_started_again(start, tmp_path):
    process, notes = start("0", "0", WAITS="yes"), tmp_path / "notes"
    until = time.monotonic() + 20
    while not notes.exists() or len(notes.read_text().splitlines()) < 2:
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert len(notes.read_text().splitlines()) == 2
