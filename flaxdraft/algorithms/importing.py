"""Drafts that other trainers wrote, of whichever algorithm: an algorithm that knows how such files look has a package
`foreign`, whose `convert.py` has `claims(config)`, whether a config.json is that of its drafts, and `convert`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flaxdraft.algorithms import DEFAULT, PACKAGE, algorithm_of, draft_packages
from flaxdraft.algorithms.loading import from_pretrained
from flaxdraft.errors import InputError
from flaxdraft.files.draft_directory import written_whole
from flaxdraft.files.json_files import write_json
from flaxdraft.files.safetensors_file import save_safetensors
from flaxdraft.plugins import find_by_architecture, find_by_name, parts_of
from flaxdraft.serving.foreign.report import Report


def converter(config: Mapping[str, Any]) -> Callable[..., Report]:
    """What brings a draft into this project's layout: of the algorithm that claims its config.json, else of the default
    one, whose errors then say what is wrong."""
    for _, folder in parts_of(PACKAGE):
        if importlib.util.find_spec(f"{folder.__name__}.foreign") is not None:
            module = importlib.import_module(f"{folder.__name__}.foreign.convert")
            if module.claims(config):
                return module.convert
    default = find_by_name(PACKAGE, DEFAULT, "algorithm.name").__name__
    return importlib.import_module(f"{default}.foreign.convert").convert


def algorithm_named(config: Mapping[str, Any]) -> str | None:
    """The algorithm whose drafts have the architecture of a config.json; None where no draft here is called so."""
    try:
        module = find_by_architecture(draft_packages(), {**config, "model_type": None}, "config.json")
    except InputError:
        return None
    return algorithm_of(module).settings.name


def write(out: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], origin: str) -> None:
    """Writes a draft's directory under a temporary name, reads it back as a draft, then puts it in place.

    Args:
        tensors: by their flat names.

    Raises:
        InputError: they do not make a draft; the message names where they came from.
    """
    with written_whole(out) as scratch:
        weights = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        save_safetensors(scratch / "model.safetensors", weights, metadata={"format": "pt"})
        write_json(scratch / "config.json", config)
        try:
            from_pretrained(scratch)
        except InputError as error:
            raise InputError(str(error).replace(str(scratch), origin)) from error
