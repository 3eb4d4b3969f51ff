"""Whether a model's chat template may write the date, by its files alone: no tokenizer is built for it."""

from __future__ import annotations

import mmap
from pathlib import Path

from flaxdraft.files.gguf_parts import parts_of

CLOCK = "strftime_now"  # what templates call
_FILES = ("tokenizer_config.json", "chat_template*", "additional_chat_templates/*.jinja")
_METADATA = 64 << 20  # bytes at the beginning of a GGUF file, in which its metadata lie


def may_write_date(path: Path) -> bool:
    """Whether a target's chat template may write the date.

    Args:
        path: a model directory or a file; of a split one, the first part holds the template.

    Raises:
        InputError: a part is missing.
    """
    word = CLOCK.encode()
    if path.is_dir():
        return any(word in file.read_bytes() for pattern in _FILES for file in path.glob(pattern) if file.is_file())
    path = parts_of(path)[0]
    if path.stat().st_size == 0:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return text.find(word, 0, _METADATA) >= 0
