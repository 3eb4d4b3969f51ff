"""Two runs in one folder; locks that nobody holds any more."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from flaxdraft.errors import InputError
from flaxdraft.stages.directory_lock import DirectoryLock


def test_a_second_run_is_refused_and_the_holder_named(tmp_path):
    with (
        DirectoryLock(tmp_path),
        pytest.raises(InputError, match=f"in use by process {os.getpid()} on {socket.gethostname()}"),
        DirectoryLock(tmp_path),
    ):
        pass
    with DirectoryLock(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_stale(tmp_path):
    script = f"from pathlib import Path; from flaxdraft.stages.directory_lock import DirectoryLock; import os, signal\n" \
             f"DirectoryLock(Path({str(tmp_path)!r})).__enter__(); os.kill(os.getpid(), signal.SIGKILL)"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert json.loads((tmp_path / "lock").read_text())["host"] == socket.gethostname()
    with DirectoryLock(tmp_path):
        pass


def test_a_holder_on_another_host_counts_while_it_touches_the_file(tmp_path):
    """As where the file system locks each host for itself."""
    path, done = tmp_path / "lock", threading.Event()
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7}))

    def touch():
        while not done.wait(0.05):
            os.utime(path)

    holder = threading.Thread(target=touch)
    holder.start()
    with pytest.raises(InputError, match=r"in use by process 7 on elsewhere"), DirectoryLock(tmp_path, stale=1.0):
        pass
    done.set()
    holder.join()
    start = time.monotonic()
    with DirectoryLock(tmp_path, touch=0.05, stale=0.4):
        assert time.monotonic() - start >= 0.4  # only then nobody touches it any more
        before = path.stat().st_mtime_ns
        time.sleep(0.2)
        assert path.stat().st_mtime_ns > before
