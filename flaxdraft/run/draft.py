"""The draft of a run: its sizes, whether it can be served, and itself before training."""

from __future__ import annotations

from typing import Any

from flax import nnx

from flaxdraft.config import nearest
from flaxdraft.data.draft_vocabulary import read_map
from flaxdraft.devices import hosts
from flaxdraft.devices.sharding import Sharding
from flaxdraft.errors import InputError
from flaxdraft.interfaces import EmbeddingAndHead, VocabMap
from flaxdraft.nn.precision import Precision
from flaxdraft.run.planned_target import PlannedTarget
from flaxdraft.run.setup import Setup
from flaxdraft.run.target import RunTarget
from flaxdraft.serving.export import check_servable
from flaxdraft.serving.record import DraftRecord


def draft_config(setup: Setup, target: RunTarget | PlannedTarget) -> Any:
    """The architecture's Config: the target's sizes, with draft.fields on top; or that of draft.init_from.

    Raises:
        InputError: draft.fields names something that the architecture has not or the algorithm's section says, or a
            size that no draft has; the draft to begin from was made with other settings of the algorithm.
    """
    wanted, settings = setup.config.draft, setup.config.algorithm
    held = {name: getattr(settings, name) for name in settings.in_draft}
    if setup.start is not None:
        for name, value in held.items():
            if (found := getattr(setup.start.config, name)) != value:
                raise InputError(
                    f"algorithm.{name}: found {value}, the draft at {wanted.init_from} has {found} and keeps it"
                )
        return setup.start.config
    config = setup.architecture.Config
    size = target.config.vocab_size if setup.algorithm.full_vocabulary else wanted.draft_vocab_size
    defaults = config.for_target(target.config, size) | held
    for name in wanted.fields:
        if name in held:
            raise InputError(f"draft.fields.{name}: algorithm.{name} says it; leave it out")
        if name not in defaults or name == "rope":
            known = sorted(set(defaults) - {"rope"})
            raise InputError(f"draft.fields: {wanted.architecture} has no {name!r}; {nearest(name, known)}")
    return config(**defaults | wanted.fields)


def check_draft(setup: Setup, target: RunTarget | PlannedTarget) -> None:
    """Before any time is spent on it.

    Raises:
        InputError: there is no such draft or vocabulary map next to this target, or no server loads it.
    """
    wanted = setup.config.draft
    if setup.start is None and wanted.vocab_map is not None:
        read_map(wanted.vocab_map, target.config.vocab_size, wanted.draft_vocab_size)
    check_servable(setup.algorithm, draft_config(setup, target), target.about, setup.config.engine)


def make_draft(
    setup: Setup,
    target: RunTarget,
    embedding_and_head: EmbeddingAndHead,
    vocab: VocabMap,
    sharding: Sharding,
    precision: Precision,
) -> nnx.Module:
    """A draft as it is before training."""
    draft = setup.architecture.make(
        draft_config(setup, target), vocab, embedding_and_head, precision=precision, sharding=sharding,
        rngs=nnx.Rngs(setup.config.seed),
    )  # fmt: skip
    if setup.start is not None:
        nnx.update(draft, setup.start.params)
    elif setup.config.draft.warm_start:
        setup.algorithm.warm_start(draft, embedding_and_head, vocab)
    return draft


def write_record(setup: Setup, target: RunTarget) -> None:
    """Keeps what a later export asks for."""
    if hosts.is_main():
        DraftRecord(
            draft_config(setup, target).to_hf(), target.config.tap_layers, target.opened.source.config,
            setup.config.target.path,
        ).write(setup.draft_dir)  # fmt: skip
