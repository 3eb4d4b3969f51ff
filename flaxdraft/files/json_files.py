"""JSON files: of one value, and of one value a line."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flaxdraft.errors import InputError


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


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, through a temporary name."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json_lines(path: Path, unit: str) -> Iterator[tuple[int, Any]]:
    """Number (from 1) and value of every line that is not blank, one at a time.

    Args:
        unit: what a line is called where one is broken.

    Raises:
        OSError: the file cannot be read.
        InputError: a line is not JSON.
    """
    # Read as bytes: text mode would also cut at separators that may stand inside JSON strings.
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)  # Windows' editors put it there
            if line.strip():
                yield number, _parse(line, f"{path} {unit} {number}", unit)


def _parse(line: bytes, where: str, unit: str) -> Any:
    try:
        row = json.loads(line.decode("utf-8"))
        json.dumps(row, ensure_ascii=False).encode("utf-8")  # JSON may name halves of characters, which are no text
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text (byte {error.start} of the {unit})") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not text in JSON ({error})") from error
    return row
