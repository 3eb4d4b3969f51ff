"""The kinds of attention and the engines that there are, found by their files, and a draft with its kind."""

from __future__ import annotations

import dataclasses

from flaxdraft.algorithms.eagle3.serving.terms import Config, Engine, Kind
from flaxdraft.plugins import parts_of
from flaxdraft.serving.contract import tables_in
from flaxdraft.serving.view import DraftView

_ALGORITHM = "flaxdraft.algorithms.eagle3"


def kinds() -> list[Kind]:
    """What every draft architecture declares."""
    return [module.SERVING for _, module in parts_of(f"{_ALGORITHM}.drafts")]


def kind_of(config: Config) -> Kind:
    """The kind that claims a config.json, else the one without fields of its own."""
    known = kinds()
    plain = [kind for kind in known if kind.claims is None]
    assert len(plain) == 1, f"{' and '.join(kind.name for kind in plain)} claim nothing; nobody can tell them apart"
    return next((kind for kind in known if kind.claims is not None and kind.claims(config)), plain[0])


@dataclasses.dataclass(frozen=True)
class View(DraftView):
    """A draft with its kind."""

    kind: Kind = dataclasses.field(kw_only=True)

    @classmethod
    def of(cls, view: DraftView, kind: Kind | None = None) -> View:
        """Of that kind, or of the one that claims its config.json."""
        known = {field.name: getattr(view, field.name) for field in dataclasses.fields(view)}
        return cls(**known, kind=kind or kind_of(view.config))


def engines() -> dict[str, Engine]:
    """Every table, by the name that a command line takes, with the kinds that name the engine themselves."""
    found, known = {}, kinds()
    for name, table in tables_in(f"{_ALGORITHM}.serving.engines").items():
        brought = {kind.name: kind.engines[name] for kind in known if name in kind.engines}
        found[name] = dataclasses.replace(table, kinds={**brought, **table.kinds})
    return found
