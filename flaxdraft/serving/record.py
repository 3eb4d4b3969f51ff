"""draft.json: what an export needs to know of a run, beside its checkpoints, so that no target has to be loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxdraft.errors import InputError
from flaxdraft.files.json_files import write_json
from flaxdraft.serving.view import read_config

NAME = "draft.json"


@dataclasses.dataclass(frozen=True)
class DraftRecord:
    """A run's draft and the target that it was trained for."""

    draft: Mapping[str, Any]  # Config.to_hf()
    tap_layers: Sequence[int]  # by output
    target: Mapping[str, Any]  # config.json
    target_path: str

    def write(self, directory: Path) -> None:
        write_json(directory / NAME, dataclasses.asdict(self))

    @classmethod
    def read(cls, directory: Path) -> DraftRecord:
        """
        Raises:
            InputError: there is none, or it is damaged.
        """
        path = directory / NAME
        if not path.exists():
            raise InputError(
                f"{directory}: no {NAME}, which says what the draft and its target are; training writes it: "
                "run the training command again, or give the run's export/ directory"
            )
        found, names = read_config(path), [field.name for field in dataclasses.fields(cls)]
        if missing := [name for name in names if name not in found]:
            raise InputError(f"{path}: {', '.join(missing)} missing; remove it and run the training command again")
        return cls(**{name: found[name] for name in names})
