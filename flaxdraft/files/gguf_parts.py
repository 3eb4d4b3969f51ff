"""The files of a GGUF model that was split: NAME-00001-of-00003.gguf and its siblings (llama.cpp's gguf-split)."""

from __future__ import annotations

import re
from pathlib import Path

from flaxdraft.errors import InputError

_PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def parts_of(path: Path) -> list[Path]:
    """All parts of the model that a file belongs to, the first one first; the file alone where its name is no part's.

    Raises:
        InputError: a part is missing.
    """
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = match["count"]
    parts = [path.with_name(f"{match['name']}-{number:05d}-of-{count}.gguf") for number in range(1, int(count) + 1)]
    for part in parts:
        if not part.is_file():
            raise InputError(f"{path}: is one of {int(count)} parts, and {part.name} is not beside it; fetch it too")
    return parts or [path]
