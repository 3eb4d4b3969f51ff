"""Small exports, and what an engine's own configuration code says of them."""

import json
from pathlib import Path
from typing import Any

import other_python
import test_dflash_import
import test_peagle_import
from test_contracts import TARGET_HF

from flaxdraft.algorithms import algorithm_of
from flaxdraft.serving.export import export
from flaxdraft.serving.trained_draft import AboutTarget, TrainedDraft

BLOCK_TAPS = test_dflash_import.TAPS
SEQUENTIAL_TAPS = test_peagle_import.TAPS


def write(folder: Path, source: Any, taps: list[int], engine: str, dtype: str = "float32") -> None:
    """A draft with random weights.

    Args:
        source: a `Source` of the import tests.
    """
    algorithm = algorithm_of(source.module, source.config)
    draft = TrainedDraft(algorithm, source.module, source.config, source.params, source.vocab)
    export(folder, draft, AboutTarget(TARGET_HF, taps), dtype=dtype, engine=engine)


def told(script: str, python: str | None, folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """What the script says of the folder's drafts.

    Args:
        python: that has the engine.
        asked: by draft.
    """
    (folder / "target").mkdir()
    (folder / "target" / "config.json").write_text(json.dumps(TARGET_HF | {"torch_dtype": "float32"}))
    return other_python.told(python, script, folder, asked)
