"""What an algorithm brings of its exports: the contract that `Algorithm.serving` gives.

An algorithm's package `serving` holds one table an engine and the rules that read it. An engine is whatever loads a
draft's directory: config.json and safetensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from flaxdraft.errors import InputError
from flaxdraft.interfaces import VocabMap
from flaxdraft.plugins import parts_of
from flaxdraft.serving.finding import Finding
from flaxdraft.serving.trained_draft import AboutTarget
from flaxdraft.serving.view import DraftView


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """What every table of an engine begins with; an algorithm's tables add what its rules ask."""

    title: str  # with the version whose source was read
    portable: bool = False  # one directory satisfies all portable engines at once, for every draft
    # The command that serves a draft, its `{draft}` a directory, `{chain}` the draft tokens of a target pass and
    # `{verified}` one more; TARGET stands for the target's directory. None: nothing computes from it, so what matters
    # in service alone is not asked.
    serve: str | None
    # Files beside the weights, by name: each says what it holds, of config.json and the run's evaluation (its result);
    # None: it is not written.
    files: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, Any]], Any]] = dataclasses.field(
        default_factory=dict, hash=False
    )

    @property
    def serves(self) -> bool:
        return self.serve is not None

    def command(self, draft: Path | str, chain_length: int) -> str:
        """What to type to serve a draft; of an engine that serves. Lines behind the first begin with four spaces."""
        assert self.serve is not None, self.title
        return self.serve.format(draft=draft, chain=chain_length, verified=chain_length + 1)


_Table = TypeVar("_Table", bound=Engine)


def like(table: Engine, kind: type[_Table], **own: Any) -> _Table:
    """The table of an engine that reads an algorithm's drafts as it reads those of `table`, but for `own`.

    Args:
        kind: of the algorithm's tables; it has every field of `table`.
    """
    fields: dict[str, Any] = {field.name: getattr(table, field.name) for field in dataclasses.fields(table)} | own
    return kind(**fields)


class Contract(Protocol):
    """A module of such functions, or an object."""

    title: str  # of the algorithm
    tags: Sequence[str]  # of the model card

    def engines(self) -> Mapping[str, Any]:
        """Every table, an `Engine`, by the name that a command line takes. `hf` is among them, the layout that is bound
        to no engine: evaluation writes and reads it."""
        ...

    # Writing. An `engine` here and below is one of these tables.
    def config_json(self, draft: Mapping[str, Any], about: AboutTarget, dtype: str, engine: Any) -> dict[str, Any]:
        """The draft's own fields (`Config.to_hf`) with what serving asks for besides."""
        ...

    def tables(self, vocab: VocabMap, engine: Any) -> dict[str, np.ndarray]:
        """The tensors that stand beside the weights."""
        ...

    # Reading.
    def flat_name(self, key: str) -> str | None:
        """The name in the draft's name table of what some writer calls `key`; None for a buffer that config.json makes
        superfluous."""
        ...

    def take_vocab(self, tensors: dict[str, np.ndarray], config: Any, origin: str) -> VocabMap:
        """Takes all that is no trained weight out of the tensors, which have flat names.

        Args:
            config: of the draft's module.

        Raises:
            InputError: they hold no vocabulary map that fits the config.
        """
        ...

    def tap_layers_of(self, config: Mapping[str, Any], target: Mapping[str, Any]) -> list[int] | None:
        """The tapped layers that a draft's config.json names, by output; None where it leaves them to the default."""
        ...

    # Asking.
    def unreadable(self, view: DraftView) -> list[Finding]:
        """What makes every further question meaningless."""
        ...

    def of_directory(self, view: DraftView) -> list[Finding]:
        """What is wrong whatever reads it."""
        ...

    def of_sizes(self, view: DraftView) -> list[Finding]:
        """Whether config.json, weights and target agree in size; a part of `of_directory`."""
        ...

    def of_config(self, engine: Any, view: DraftView) -> list[Finding]:
        """What the engine makes of config.json."""
        ...

    def of_tensors(self, engine: Any, view: DraftView) -> list[Finding]:
        """What the engine makes of the tensors."""
        ...

    # The model card.
    def describe(self, config: Mapping[str, Any]) -> str:
        """The draft in a few words."""
        ...

    def describe_training(self, settings: Mapping[str, Any]) -> str:
        """What the algorithm's section of the configuration says of a run."""
        ...


def tables_in(package: str) -> dict[str, Any]:
    """The tables of an algorithm's engines, one a file of the package, by the names that a command line takes."""
    return {name.replace("_", "-"): module.ENGINE for name, module in sorted(parts_of(package))}


def find_engine(contract: Contract, name: str, field: str = "engine") -> Any:
    """
    Args:
        field: where the name was given, for the message.

    Raises:
        InputError: no such engine.
    """
    known = contract.engines()
    if name not in known:
        raise InputError(
            f"{field}: no {name!r}; known are {', '.join(known)}. A new one is a new file in serving/engines/ of the "
            "algorithm's folder"
        )
    return known[name]


def of_engine(contract: Contract, engine: Any, view: DraftView) -> list[Finding]:
    """All that an engine makes of a draft."""
    return [*contract.of_config(engine, view), *contract.of_tensors(engine, view)]
