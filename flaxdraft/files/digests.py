"""sha256 of large files, kept from one start to the next: 16 GB of weights are read once for it, not at every start.

A kept digest counts as long as the file has the size, the inode and the two times (of its content and of its inode, in
nanoseconds) that it had when it was read. This assumes that the file system gives a file a new time when it is written.
Such clocks tick, some only every other second, and a second write may fall into the tick of the first: of a file that
was younger than that when it was read nothing is kept. Whoever does not trust the assumption removes the folder of kept
digests, and every file is read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flaxdraft.errors import InputError
from flaxdraft.progress import bar

SMALL = 16 << 20  # bytes: up to this a file is read each time, in a few hundredths of a second
SETTLED_SECONDS = 2.0  # the coarsest clock of a file system that is in use (FAT's)
_BLOCK = 4 << 20
_THREADS = 8

_Stamp = dict[str, int]


def digests_of(paths: Sequence[Path], kept: Path | None) -> list[str]:
    """Hex digests (sha256) of files, read side by side; those of large files come from `kept` where they count.

    Args:
        kept: the folder of kept digests, made where it is missing; one that cannot be used only costs time. None where
            there is none.

    Raises:
        InputError: a file cannot be read, or is written to meanwhile.
    """
    found: dict[Path, str] = {}
    missing: dict[Path, int] = {}
    for path in paths:
        with _named(path):
            stamp = _stamp_of(path.stat())
        if stamp["size"] <= SMALL:
            found[path] = _read(path, lambda _: None)[0]
        elif digest := _recall(path, stamp, kept):
            found[path] = digest
        else:
            missing[path] = stamp["size"]
    if missing:
        found |= zip(missing, _read_large([*missing], sum(missing.values()), kept), strict=True)
    return [found[path] for path in paths]


def _read_large(paths: Sequence[Path], num_bytes: int, kept: Path | None) -> list[str]:
    """In threads, since hashing lets other threads run."""
    lock = threading.Lock()
    with bar("sha256 of the target's files, MB", num_bytes // 10**6) as progress, ThreadPoolExecutor(_THREADS) as pool:

        def advance(size: int) -> None:
            with lock:
                progress.advance(size / 1e6, "")

        def one(path: Path) -> str:
            digest, stamp, age = _read(path, advance)
            if age >= SETTLED_SECONDS:
                _keep(path, stamp, digest, kept)
            return digest

        return list(pool.map(one, paths))


def _read(path: Path, advance: Callable[[int], None]) -> tuple[str, _Stamp, float]:
    """A file's digest, what it looked like, and how many seconds it had been left alone."""
    digest = hashlib.sha256()
    with _named(path), path.open("rb", buffering=0) as file:
        stamp, began = _stamp_of(os.fstat(file.fileno())), time.time()
        while block := file.read(_BLOCK):
            digest.update(block)
            advance(len(block))
        now = _stamp_of(os.fstat(file.fileno()))
    if (stamp["size"], stamp["mtime_ns"]) != (now["size"], now["mtime_ns"]):
        raise InputError(f"{path}: was written to while it was read; wait until it is complete and run again")
    return digest.hexdigest(), stamp, began - max(stamp["mtime_ns"], stamp["ctime_ns"]) / 1e9


def _stamp_of(stat: os.stat_result) -> _Stamp:
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns, "inode": stat.st_ino}


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """
    Raises:
        InputError: for what the system says of a file, with the file's name.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); make it readable, or fetch it again") from error


def _entry(path: Path, kept: Path) -> Path:
    """One small file for each large one, so that processes which write at the same time lose nothing."""
    return kept / hashlib.sha256(os.fsencode(path.resolve())).hexdigest()


def _recall(path: Path, stamp: _Stamp, kept: Path | None) -> str | None:
    """The kept digest; None where there is none, it is damaged, or the file has changed."""
    if kept is None:
        return None
    try:
        check, record = _entry(path, kept).read_bytes().split(b"\n", 1)
    except (OSError, ValueError):
        return None
    if check != hashlib.sha256(record).hexdigest().encode():
        return None
    found = json.loads(record)
    return found["sha256"] if found["stamp"] == stamp else None


def _keep(path: Path, stamp: _Stamp, digest: str, kept: Path | None) -> None:
    if kept is None:
        return
    record = json.dumps({"path": str(path.resolve()), "stamp": stamp, "sha256": digest}).encode()
    with contextlib.suppress(OSError):  # the next start reads the file again
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept) as scratch:
            written = Path(scratch) / "entry"
            written.write_bytes(hashlib.sha256(record).hexdigest().encode() + b"\n" + record)
            os.replace(written, _entry(path, kept))
