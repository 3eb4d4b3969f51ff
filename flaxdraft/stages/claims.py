"""Stages under the output directory: each keeps what it was made from, and is skipped while that stays the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flaxdraft.devices import hosts
from flaxdraft.errors import InputError
from flaxdraft.files.json_files import write_json
from flaxdraft.stages import same_inputs

RECORD = "inputs.json"
_NO_RESULT = ("lock", "logs")  # what every run leaves, also one that stopped at once


def claim(directory: Path, inputs: Mapping[str, Any], mend: str, allowed: Iterable[str] | None = None) -> None:
    """Makes the directory this run's, or checks that it is: what lies there must come from inputs that this run may go
    on with (see same_inputs.py), which it then replaces with its own.

    Args:
        allowed: fields that the user allows to differ; None where the command has no flag for it.

    Raises:
        InputError: it cannot be written, or holds another configuration (every differing field is listed).
    """
    record = directory / RECORD
    inputs = json.loads(json.dumps(inputs))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise PermissionError(13, "Permission denied")
        # A run that stopped at wrong input before it made anything has claimed nothing.
        if all(path.name.startswith(record.name) or path.name in _NO_RESULT for path in directory.iterdir()):
            write_json(record, inputs)
        elif not record.exists():
            raise InputError(f"output_dir: {directory} holds other files; choose another one. {mend}")
    except OSError as error:
        raise InputError(f"output_dir: cannot write to {directory} ({error.strerror}); choose another one") from error
    if check_claimed(directory, inputs, mend, allowed) != inputs:
        write_json(record, inputs)


def claim_together(directory: Path, inputs: Mapping[str, Any], mend: str) -> None:
    """The directory becomes that of all processes of a command.

    Raises:
        InputError: see `claim` and `check_claimed`.
    """
    with hosts.main_first(f"claim {directory}"):
        (claim if hosts.is_main() else check_claimed)(directory, inputs, mend)


def check_claimed(
    directory: Path, inputs: Mapping[str, Any], mend: str, allowed: Iterable[str] | None = None
) -> dict[str, Any]:
    """The same check without a write: for the processes beside the one that claims. Returns the inputs found there.

    Raises:
        InputError: it holds another configuration, or what another process has written is not seen from here.
    """
    record = directory / RECORD
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{record}: cannot be read ({error.strerror}); output_dir must lie where all processes of the run see it"
        ) from error
    except ValueError as error:
        raise InputError(f"{record}: not valid JSON ({error}); remove {directory} to start anew") from error
    if differences := same_inputs.differing(found, inputs, allowed or ()):
        if allowed is not None:
            mend += f" To go on regardless, add {same_inputs.flags(differences)}."
        raise InputError(
            f"output_dir: {directory} was made with another configuration ({same_inputs.describe(differences)}). {mend}"
        )
    return found


class Stage:
    """A result file that is rebuilt when its inputs change."""

    def __init__(self, path: Path, inputs: Mapping[str, Any]):
        older = same_inputs.as_older_runs(same_inputs.binding(inputs))
        self.path = path
        self._keys = [hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest() for fields in older]

    def load(self) -> Any | None:
        """The stored result, or None where there is none from these inputs."""
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return stored["result"] if isinstance(stored, dict) and stored.get("inputs") in self._keys else None

    def store(self, result: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"inputs": self._keys[0], "result": result})
