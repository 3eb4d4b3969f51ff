"""Beginning from another draft: what a run's configuration and its target must agree on with it.

`draft.init_from` is a serving directory, or a checkpoint of a run (RUN/llama/checkpoints/best), of which the weights
and the vocabulary map are taken and nothing else: steps, moments and the position in the data begin anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from flaxdraft.config import DraftConfig
from flaxdraft.errors import InputError
from flaxdraft.run.draft_source import draft_files, load_draft, tap_layers_of
from flaxdraft.serving.trained_draft import TrainedDraft


def start_files(address: str) -> list[Path]:
    """See `draft_files`."""
    return draft_files(Path(address).expanduser())


def load_start(config: DraftConfig, module: ModuleType) -> TrainedDraft:
    """The draft at `config.init_from`, whose sizes and vocabulary map replace the configured defaults.

    Raises:
        InputError: it cannot be read (see `load_draft`), is of another architecture, or the configuration asks for
            other sizes.
    """
    assert config.init_from is not None
    start = load_draft(Path(config.init_from).expanduser())
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


def check_target(start: TrainedDraft, address: str, target: Any, target_json: Mapping[str, Any]) -> None:
    """
    Args:
        address: `draft.init_from`.
        target: the configuration of the run's target, and its config.json.

    Raises:
        InputError: the draft was made for a target of another width or vocabulary, or for other tapped layers.
    """
    ours_tapped = list(target.tap_layers)
    theirs_tapped = tap_layers_of(Path(address).expanduser(), target_json)
    for name, theirs, ours in (
        ("target_hidden_size", start.config.target_hidden_size, target.hidden_size),
        ("vocab_size", start.config.vocab_size, target.vocab_size),
        ("tapped layers", ours_tapped if theirs_tapped is None else theirs_tapped, ours_tapped),
    ):
        if theirs != ours:
            raise InputError(
                f"draft.init_from: {address} has {name} {theirs}, this target {ours}; it was made for another one"
            )
