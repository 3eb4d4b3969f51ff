"""Two runs in one folder; lock files that nobody holds any more."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys

import pytest

from flaxdraft.errors import InputError
from flaxdraft.stages.directory_lock import directory_lock

HOLDER = """
import sys
from pathlib import Path
from flaxdraft.stages.directory_lock import directory_lock
with directory_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder's lock."""
    command = [sys.executable, "-c", HOLDER, tmp_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_and_the_holder_named(tmp_path, holder):
    named = rf"in use by process {holder.pid} on {socket.gethostname()}; wait for it"
    for _ in range(2):  # being refused leaves the name where it is
        with pytest.raises(InputError, match=named), directory_lock(tmp_path):
            pass
    holder.stdin.close()
    assert holder.wait(10) == 0
    with directory_lock(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert json.loads((tmp_path / "lock").read_text())["pid"] == holder.pid
    with directory_lock(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_lock_file_that_an_earlier_version_left_is_free(tmp_path):
    """Also one that names a holder on another host, and is longer than what comes into it."""
    (tmp_path / "lock").write_text(json.dumps({"host": "elsewhere" * 30, "pid": 7}))
    with (
        directory_lock(tmp_path),
        pytest.raises(InputError, match=f"in use by process {os.getpid()} on"),
        directory_lock(tmp_path),
    ):
        pass


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(InputError, match=r"lock cannot be locked \(Function not implemented\); give an output_dir="):
        directory_lock(tmp_path).__enter__()
