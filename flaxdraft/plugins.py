"""Parts that are found by their names: algorithms, draft architectures, target families, engines.

A package of parts (`flaxdraft.algorithms`, `flaxdraft.targets`, ...) holds one module or folder a part; a new one is
found without being registered anywhere. What the parts of a package share is named in its SHARED. Parts may also lie
outside this project: an installed package names them in its entry points, in a group that is called as the package
here is:

    [project.entry-points."flaxdraft.algorithms"]
    mine = "my_package.mine"
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from flaxdraft.errors import InputError

if TYPE_CHECKING:
    from flaxdraft.config import AlgorithmConfig


@functools.cache
def _installed(package: str, path: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Name and module of each part that installed packages bring. Finding them opens a file of every package on `path`,
    which takes tens of milliseconds."""
    return tuple((point.name, point.value) for point in importlib.metadata.entry_points(group=package))


def _places(package: str) -> dict[str, str]:
    """The full module name of each part, by its short name.

    Raises:
        InputError: an installed package calls a part of its own as another one is called.
    """
    root = importlib.import_module(package)
    names = {info.name for info in pkgutil.iter_modules(root.__path__)} - {*getattr(root, "SHARED", ()), "__main__"}
    places = {name: f"{package}.{name}" for name in sorted(names)}
    for name, place in _installed(package, tuple(sys.path)):
        if (other := places.setdefault(name, place)) != place:
            raise InputError(
                f"entry point {name!r} in {package}: {place} and {other} have the same name; give one of them another"
            )
    return places


def parts_of(package: str) -> Iterator[tuple[str, ModuleType]]:
    """Every part of a package with its short name."""
    for name, place in _places(package).items():
        yield name, importlib.import_module(place)


def find_by_name(package: str, name: str, field: str) -> ModuleType:
    """The part of that name.

    Raises:
        InputError: no such part; the message lists the names that there are.
    """
    places = _places(package)
    if name not in places:
        raise InputError(
            f"{field}: no {name!r} in {package}; found {', '.join(sorted(places))}. "
            f"A new one is a new part of {package}, see CONTRIBUTING.md"
        )
    return importlib.import_module(places[name])


def settings_of(algorithm: str) -> type[AlgorithmConfig]:
    """The section of the configuration that an algorithm brings. No JAX is started for it.

    Raises:
        InputError: there is no such algorithm.
    """
    folder = find_by_name("flaxdraft.algorithms", algorithm, "algorithm.name").__name__
    return importlib.import_module(f"{folder}.settings").Settings


def architectures_of(config: Mapping[str, Any]) -> list[str]:
    """The names that a config.json gives its architecture; none where the field is missing or no list. What is no name
    is left out."""
    found = config.get("architectures")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def first_architecture(config: Mapping[str, Any]) -> str | None:
    """The first of these names, by which engines and libraries choose."""
    return next(iter(architectures_of(config)), None)


def find_by_architecture(packages: list[str], config: dict[str, Any], origin: str, advice: str = "") -> ModuleType:
    """The part that declares the config's `architectures` (first) or `model_type`. A part whose names others declare
    too may have a function `claims(config)`, which says whether a config is its own; what nobody claims is for the part
    without that function.

    Args:
        advice: a sentence that ends the message where no part declares it.

    Raises:
        InputError: none declares it, or two do; `architectures` is no list.
    """
    if not isinstance(found := config.get("architectures"), list | type(None)):
        raise InputError(f"{origin}: architectures: found {found!r}, expected a list of names")
    named, model_type = first_architecture(config), config.get("model_type")
    wanted = [name for name in (named, model_type) if isinstance(name, str)]
    known: dict[str, list[ModuleType]] = {}
    for package in packages:
        for _, module in parts_of(package):
            for declared in (*module.ARCHITECTURES, *module.MODEL_TYPES):
                if module not in (modules := known.setdefault(declared, [])):
                    modules.append(module)
    for key in wanted:
        declared = known.get(key, [])
        claiming = [part for part in declared if hasattr(part, "claims") and part.claims(config)]
        found = claiming or [part for part in declared if not hasattr(part, "claims")]
        if len(found) > 1:
            raise InputError(f"{origin}: {' and '.join(module.__name__ for module in found)} both declare {key!r}")
        if found:
            return found[0]
    message = (
        f"{origin}: architecture {named or model_type!r} (model_type {model_type!r}) is not supported; supported are "
        f"{', '.join(sorted(known))}. A new one is a new part of {packages[0]}, see CONTRIBUTING.md"
    )
    raise InputError(f"{message}. {advice}" if advice else message)
