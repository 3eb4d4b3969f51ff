"""Draft -> serving directory: safetensors and config.json as an engine asks for them.

What is about to be written is held against the engine's rules first, and refused where the engine would not serve the
trained draft.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from flaxdraft.errors import InputError
from flaxdraft.files.draft_directory import check_replaceable, written_whole
from flaxdraft.files.json_files import write_json
from flaxdraft.files.name_tables import state_to_torch
from flaxdraft.files.safetensors_file import save_safetensors
from flaxdraft.interfaces import Algorithm, DraftConfig
from flaxdraft.serving.card import NAME, evaluation_of, model_card
from flaxdraft.serving.contract import Contract, Engine, find_engine, of_engine
from flaxdraft.serving.finding import Finding, first_fault
from flaxdraft.serving.trained_draft import AboutTarget, Origin, TrainedDraft
from flaxdraft.serving.view import DraftView, view_of_arrays

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def _refuse(engine: Engine, findings: Iterable[Finding]) -> None:
    if finding := first_fault(findings):
        raise InputError(f"export for {engine.title}: {finding.what}; {finding.mend}")


def check_servable(algorithm: Algorithm, draft: DraftConfig, target: AboutTarget, engine: str) -> None:
    """Asks before training what an export would refuse after it.

    Raises:
        InputError: the engine cannot serve a draft of this configuration; the reason is the contract's.
    """
    contract: Contract = algorithm.serving()
    table = find_engine(contract, engine)
    config = contract.config_json(draft.to_hf(), target, "float32", table)
    _refuse(table, contract.of_config(table, DraftView(config, {}, {}, {}.__getitem__, target.config)))


def export(
    directory: Path, draft: TrainedDraft, target: AboutTarget, *, dtype: str, engine: str, origin: Origin | None = None
) -> None:
    """Writes the whole directory under a temporary name, then puts it in place.

    Args:
        engine: whose rules it must meet, by its name in the algorithm's contract.
        origin: with it the directory gets a model card, README.md.

    Raises:
        InputError: a weight is not finite, or the engine could not serve such a draft.
    """
    contract: Contract = draft.algorithm.serving()
    table = find_engine(contract, engine)
    config = contract.config_json(draft.config.to_hf(), target, dtype, table)
    tensors = state_to_torch(draft.params, draft.module.name_table(draft.config), DTYPES[dtype])
    for name, array in tensors.items():
        if not np.isfinite(array.astype(np.float32)).all():
            raise InputError(f"export: {name} holds values that are not finite in {dtype}; choose another dtype")
    tensors |= contract.tables(draft.vocab, table)
    view = view_of_arrays(config, tensors, target.config)
    _refuse(table, [*of_engine(contract, table, view), *contract.of_sizes(view)])
    with written_whole(directory) as scratch:
        save_safetensors(scratch / "model.safetensors", tensors, metadata={"format": "pt"})
        write_json(scratch / "config.json", config)
        evaluation = {} if origin is None else evaluation_of(origin)
        for name, made in table.files.items():
            if (value := made(config, evaluation)) is not None:
                write_json(scratch / name, value)
        if origin is not None:
            card = model_card(draft, config, target, origin, _takers(contract, view))
            (scratch / NAME).write_text(card, encoding="utf-8")


def _takers(contract: Contract, view: DraftView) -> list[Engine]:
    """The engines that serve the directory as it is."""
    serving = [engine for engine in contract.engines().values() if engine.serves]
    return [engine for engine in serving if not first_fault(of_engine(contract, engine, view))]


def export_again(directory: Path, draft: TrainedDraft, target: AboutTarget, **how: Any) -> None:
    """An export to where something may lie.

    Args:
        how: see `export`.

    Raises:
        InputError: what lies there is no draft's directory; see `export` for the rest.
    """
    check_replaceable(directory)
    export(directory, draft, target, **how)
