"""A draft from wherever it lies: an exported directory, or a checkpoint of a run.

A run's draft folder (RUN/llama) holds its checkpoints and draft.json, which says what the draft and its target are; one
of the checkpoints may be named itself (RUN/llama/checkpoints/best).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flaxdraft.algorithms import algorithm_of, draft_packages
from flaxdraft.algorithms.loading import abstract_params, from_pretrained, serving_files, tapped_layers
from flaxdraft.errors import InputError
from flaxdraft.interfaces import VocabMap
from flaxdraft.plugins import find_by_architecture
from flaxdraft.serving.card import recorded_template
from flaxdraft.serving.record import DraftRecord
from flaxdraft.serving.trained_draft import AboutTarget, Origin, TrainedDraft
from flaxdraft.serving.view import read_config
from flaxdraft.train.checkpoint import DamagedError, load_params, read_record


class DraftSource(NamedTuple):
    """A trained draft with what is known of its target, of which no weight is loaded."""

    draft: TrainedDraft
    target: AboutTarget
    origin: Origin


class RunsDraft(NamedTuple):
    """A draft that is a checkpoint of a run."""

    run: Path  # the draft folder
    checkpoint: Path
    record: DraftRecord

    @classmethod
    def at(cls, path: Path, step: str = "latest") -> RunsDraft | None:
        """None where the path is neither a run's draft folder nor one of its checkpoints.

        Args:
            step: of the folder's checkpoints: a number, "latest" or "best" (where the run keeps a link of that name).

        Raises:
            InputError: there is no such checkpoint, or no record of the run.
        """
        run = path
        if path.parent.name == "checkpoints":
            run, step = path.parent.parent, path.name
        elif not (path / "checkpoints").is_dir():
            return None
        return cls(run, _checkpoint(run / "checkpoints", step), DraftRecord.read(run))

    def load(self) -> tuple[TrainedDraft, int]:
        """The draft and the step that it is of.

        Raises:
            InputError: the checkpoint is damaged, or of no known architecture.
        """
        module = find_by_architecture(draft_packages(), dict(self.record.draft), str(self.run))
        config = module.Config.from_hf(self.record.draft)
        try:
            params, ids = load_params(self.checkpoint, abstract_params(module, config))
            step = read_record(self.checkpoint)["step"]  # the folder may be a link's copy
        except DamagedError as error:
            raise InputError(f"{self.checkpoint}: cannot be read ({error}); take another one with --step") from error
        vocab = VocabMap(ids, config.vocab_size)
        return TrainedDraft(algorithm_of(module, config), module, config, params, vocab), step


def _checkpoint(directory: Path, step: str) -> Path:
    steps = sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())
    chosen = directory / (str(steps[-1]) if step == "latest" and steps else step)
    if not chosen.is_dir():
        raise InputError(f"{directory}: no checkpoint {step!r}; there are {', '.join(map(str, steps)) or 'none'}")
    return chosen


def open_draft(path: Path, *, step: str = "latest", target: Mapping[str, Any] | None = None) -> DraftSource:
    """
    Args:
        step: see `RunsDraft.at`.
        target: the target's config.json, which an exported directory does not hold.

    Raises:
        InputError: no draft lies there, it is incomplete or damaged, or nobody knows which layers it taps.
    """
    found = RunsDraft.at(path, step)
    if found is not None:
        draft, number = found.load()
        record = found.record
        return DraftSource(
            draft, AboutTarget(record.target, record.tap_layers), Origin(record.target_path, found.run, number)
        )
    draft, written, target = from_pretrained(path), read_config(path / "config.json"), target or {}
    taps = tapped_layers(path, target)
    if taps is None and "num_hidden_layers" in target:
        taps = draft.algorithm.tap_layers(target["num_hidden_layers"], None)
    if taps is None:
        raise InputError(f"{path}: config.json names no tapped layers; give --target, whose defaults they then are")
    # What stands there for the tokenizer came from the target.
    tokens = {name: written[name] for name in written if name.endswith("_token_id")}
    return DraftSource(
        draft, AboutTarget(tokens | dict(target), taps), Origin("TARGET", None, None, recorded_template(path))
    )


def load_draft(path: Path) -> TrainedDraft:
    """The draft alone.

    Raises:
        InputError: see `open_draft`.
    """
    found = RunsDraft.at(path)
    return from_pretrained(path) if found is None else found.load()[0]


def draft_files(path: Path) -> list[Path]:
    """The files whose digests say which draft it is. A checkpoint's metadata hold the time of its save."""
    found = RunsDraft.at(path)
    return serving_files(path) if found is None else [found.checkpoint / "_CHECKPOINT_METADATA"]


def tap_layers_of(path: Path, target: Mapping[str, Any]) -> list[int] | None:
    """The layers that it was trained on, by output; None where it leaves them to the default.

    Args:
        target: the target's config.json.
    """
    found = RunsDraft.at(path)
    return tapped_layers(path, target) if found is None else list(found.record.tap_layers)
