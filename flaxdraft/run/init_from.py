"""Beginning from another draft: what a run's configuration and its target must agree on with it.

`draft.init_from` is a serving directory, or a checkpoint of a run (RUN/llama/checkpoints/best), of which the weights
and the vocabulary map are taken and nothing else: steps, moments and the position in the data begin anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from flaxdraft.algorithms.eagle3.serving.layer_ids import outputs_of
from flaxdraft.algorithms.loading import LoadedDraft, from_pretrained, serving_files
from flaxdraft.config import DraftConfig
from flaxdraft.errors import InputError
from flaxdraft.serving.export import open_draft
from flaxdraft.serving.record import DraftRecord


def _run_of(path: Path) -> Path | None:
    """The draft folder of the run whose checkpoint the path is; None where it is none."""
    return path.parent.parent if path.parent.name == "checkpoints" else None


def start_files(directory: str) -> list[Path]:
    """The files whose digests say which draft it is. A checkpoint's metadata hold the time of its save."""
    path = Path(directory).expanduser()
    return serving_files(path) if _run_of(path) is None else [path / "_CHECKPOINT_METADATA"]


def load_start(config: DraftConfig, module: ModuleType) -> LoadedDraft:
    """The draft at `config.init_from`, whose sizes and vocabulary map replace the configured defaults.

    Raises:
        InputError: it cannot be read (see `from_pretrained` and `open_draft`), is of another architecture, or the
            configuration asks for other sizes.
    """
    path = Path(config.init_from).expanduser()
    run = _run_of(path)
    start = from_pretrained(path) if run is None else open_draft(run, step=path.name).draft
    if start.module is not module:
        raise InputError(
            f"draft.init_from: {config.init_from} holds a {start.module.__name__.rpartition('.')[2]} draft, "
            f"draft.architecture says {config.architecture}; make them agree"
        )
    asked = dict(config.fields)
    if "draft_vocab_size" in config.model_fields_set:
        asked["draft_vocab_size"] = config.draft_vocab_size
    for name, value in asked.items():
        if getattr(start.config, name, None) != value:
            raise InputError(
                f"draft.{name if name == 'draft_vocab_size' else f'fields.{name}'}: {value!r} was asked for, the draft "
                f"at {config.init_from} has {getattr(start.config, name, None)!r}; a loaded draft keeps its sizes and "
                "its vocabulary map, so leave the field out"
            )
    return start


def check_target(start: LoadedDraft, target: Any, directory: str) -> None:
    """
    Raises:
        InputError: the draft was made for a target of another width or vocabulary, or for other tapped layers.
    """
    path = Path(directory).expanduser()
    if (run := _run_of(path)) is not None:
        taps = list(DraftRecord.read(run).tap_layers)
    else:
        written = json.loads((path / "config.json").read_text(encoding="utf-8"))
        taps = outputs_of(written, deepseek=hasattr(target, "kv_lora_rank"))
    for name, theirs, ours in (
        ("target_hidden_size", start.config.target_hidden_size, target.hidden_size),
        ("vocab_size", start.config.vocab_size, target.vocab_size),
        ("tapped layers", list(target.tap_layers) if taps is None else taps, list(target.tap_layers)),
    ):
        if theirs != ours:
            raise InputError(
                f"draft.init_from: {directory} has {name} {theirs}, this target {ours}; it was made for another one"
            )
