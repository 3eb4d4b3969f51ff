"""A draft's directory is written whole under another name, and takes the place of an older one then."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flaxdraft.errors import InputError

_FILES = {"config.json", "model.safetensors", "README.md"}  # all that such a directory holds


def check_replaceable(directory: Path) -> None:
    """
    Raises:
        InputError: something lies there that was not written here, such as a target or another trainer's checkpoint.
    """
    if not directory.exists():
        return
    found = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    if "config.json" not in found or found - _FILES:
        other = f" (it holds {min(found - _FILES)})" if found - _FILES else ""
        raise InputError(f"{directory}: exists and is no draft's directory{other}; choose another name")


@contextmanager
def written_whole(directory: Path) -> Iterator[Path]:
    """An empty directory to write into. What was there before stays if the block fails."""
    scratch, before = (directory.with_name(directory.name + end) for end in (".tmp", ".before"))
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(before, ignore_errors=True)
    if directory.exists():
        os.replace(directory, before)
    os.replace(scratch, directory)
    shutil.rmtree(before, ignore_errors=True)
