"""JSON files: of one value, and of one value a line."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flaxdraft.errors import InputError

# Files that people give for JSON: how they begin, and what to do with them.
_OTHERS = {
    "compressed (gzip)": (b"\x1f\x8b", "unpack it"), "compressed (zstd)": (b"\x28\xb5\x2f\xfd", "unpack it"),
    "a zip archive": (b"PK\x03\x04", "unpack it"), "a Parquet file": (b"PAR1", "give it a name that ends in .parquet"),
}  # fmt: skip


def read_json_object(path: Path, role: str, mend: str) -> dict[str, Any]:
    """
    Args:
        role: who needs the file, for the message where it is missing.
        mend: what to do where it is damaged.

    Raises:
        InputError: missing, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {role}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); {mend}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected an object, found {type(value).__name__}; {mend}")
    return value


def read_record(path: Path) -> dict[str, Any]:
    """The object in a file that may be there; nothing where it is not, is damaged, or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, through a temporary name."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json_lines(
    path: Path, unit: str, on_bad: Callable[[InputError], None] | None = None
) -> Iterator[tuple[int, Any]]:  # fmt: skip
    """Number (from 1) and value of every line that is not blank, one at a time. A file that is one JSON array of
    objects is read as well, its items for lines.

    Args:
        unit: what a line is called where one is broken.
        on_bad: is given what is wrong with a line, which is then left out; where None, it is raised.

    Raises:
        OSError: the file cannot be read.
        InputError: a line is not JSON.
    """
    array = _array(path)
    for number, value in _lines(path) if array is None else enumerate(array, 1):
        where = f"{path} {unit} {number}"
        try:
            row = _parse(value, where, unit) if isinstance(value, bytes) else _as_text(value, where)
        except InputError as error:
            if on_bad is None:
                raise
            on_bad(error)
        else:
            yield number, row


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    # Read as bytes: text mode would also cut at separators that may stand inside JSON strings.
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)  # Windows' editors put it there
            if line.strip():
                yield number, line


def _array(path: Path) -> list[Any] | None:
    """The items of a file that is a JSON array of objects. One that is none stays: whoever reads the items names it.

    Raises:
        InputError: it begins like one over many lines, and is none; or with an object over many lines; or it is no
            text at all.
    """
    with path.open("rb") as file:
        magic = file.read(4)
        for kind, (begins, mend) in _OTHERS.items():
            if magic.startswith(begins):
                raise InputError(f"{path}: is {kind}; {mend}")
        file.seek(0)
        first = next((line for line in file if line.removeprefix(codecs.BOM_UTF8).strip()), b"")
        first = first.removeprefix(codecs.BOM_UTF8).strip()
        if first.startswith(b"{"):
            _check_object(path, first)
        if not first.startswith(b"["):
            return None
        file.seek(0)
        try:
            value = json.loads(file.read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            if first.endswith(b"]"):  # lines that are lists
                return None
            raise InputError(f"{path}: begins like a JSON array and is none ({error}); write one row a line") from error
    return value if not value or any(isinstance(item, dict) for item in value) else None


def _check_object(path: Path, first: bytes) -> None:
    """Refuses a file that begins with an object over many lines.

    Args:
        first: line of the file.

    Raises:
        InputError: an object begins there that ends in another line.
    """
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(first)
        return
    text = path.read_bytes().decode("utf-8-sig", errors="replace").lstrip()
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):  # the line is broken, whatever follows
        return
    if "\n" in text[:end]:
        raise InputError(f"{path}: begins with a JSON object over many lines; write one row a line")


def _parse(line: bytes, where: str, unit: str) -> Any:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text (byte {error.start} of the {unit})") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not text in JSON ({error})") from error
    return _as_text(value, where)


def _as_text(row: Any, where: str) -> Any:
    """JSON may name halves of characters, which are no text."""
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not text in JSON ({error})") from error
    return row
