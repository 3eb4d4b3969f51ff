"""One run at a time in a directory.

The kernel holds the lock and lets go of it when the process ends, however that happens: on one host a stale lock cannot
be. Some network file systems lock each host for itself, so the file also names its holder, who touches it; a file of
another host that nobody touches any more is stale.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from flaxdraft.errors import InputError

_TOUCH = 5.0  # seconds
_STALE = 4 * _TOUCH


class DirectoryLock:
    """Held from `with` to its end."""

    def __init__(self, directory: Path, touch: float = _TOUCH, stale: float = _STALE):
        self._directory, self._path = directory, directory / "lock"
        self._touch, self._stale = touch, stale
        self._done = threading.Event()
        self._file: Any = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> DirectoryLock:
        """
        Raises:
            InputError: another run holds it; its host and process are named.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = self._holder()
            self._file.close()
            raise self._refusal(holder) from None
        holder = self._holder()
        if holder is not None and holder["host"] != socket.gethostname() and self._is_touched():
            self._file.close()
            raise self._refusal(holder)
        self._file.truncate(0)
        self._file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        self._file.flush()
        self._thread = threading.Thread(target=self._keep_touching, name="lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self._file.truncate(0)
        self._file.close()

    def _holder(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._path.read_text(encoding="utf-8"))
        except ValueError:  # empty: whoever held it ended well
            return None

    def _is_touched(self) -> bool:
        """Whether somebody touches the file, watched for as long as it takes to be sure."""
        before, start = self._path.stat().st_mtime_ns, time.monotonic()
        while time.monotonic() - start < self._stale:
            time.sleep(self._stale / 20)
            if self._path.stat().st_mtime_ns != before:
                return True
        return False

    def _keep_touching(self) -> None:
        while not self._done.wait(self._touch):
            os.utime(self._path)

    def _refusal(self, holder: dict[str, Any] | None) -> InputError:
        who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
        return InputError(
            f"output_dir: {self._directory} is in use by {who}; wait for it, end it, or give another output_dir= or "
            "name="
        )
