"""One run at a time in a directory: a lock on the file `lock` in it, by `filelock`.

The kernel holds the lock and lets go of it when the process ends, however that happens: a lock cannot be stale, and the
file, which stays, means nothing by itself. It says who took it last, in JSON.

On a network file system the lock holds between hosts wherever `flock` does. Mounted so that each host locks for itself
(NFS with `nolock` or `local_lock`, Lustre with `localflock`), a second run on another host is not noticed.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from flaxdraft.errors import InputError


@contextmanager
def directory_lock(directory: Path) -> Iterator[None]:
    """Holds the lock of a directory, which is made if need be.

    Raises:
        InputError: it cannot be made, another run holds it (its host and process are named), or the file system knows
            no locks.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output_dir: cannot write to {directory} ({error.strerror}); choose another one") from error
    path = directory / "lock"
    # A lock that is no more than a file would outlive a killed run, and stop those that are to go on from it.
    lock = FileLock(path, timeout=0, fallback_to_soft=False, on_acquired=_sign)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"output_dir: {directory} is in use by {_holder(path)}; wait for it, end it, or give another output_dir= "
            "or name="
        ) from None
    except OSError as error:
        raise InputError(
            f"output_dir: {path} cannot be locked ({error.strerror}); give an output_dir= on a file system that has "
            "flock (Lustre has it where mounted with `flock`)"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _sign(descriptor: int) -> None:
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # locked a moment ago, and not signed yet
        return "another process"
    return f"process {holder['pid']} on {holder['host']}"
