"""What is seen of a field of the configuration: the kinds of rows of test_wire.py's tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from wiring import Ended, First


@dataclasses.dataclass(frozen=True)
class Differs:
    """Something is not the same with another value. `look` is a method of `Command`."""

    look: str
    to: Any
    given: tuple[str, ...] = ()  # overrides of both


@dataclasses.dataclass(frozen=True)
class Begins:
    """What reaches the first step is as another value says."""

    to: Any
    holds: Callable[[First, Any], bool]


@dataclasses.dataclass(frozen=True)
class Ends:
    """A run of `run.yaml` and one with all of OTHER end as their own values say, and not as the other's says."""

    holds: Callable[[Ended, Any], bool]


@dataclasses.dataclass(frozen=True)
class Says:
    """With another value the run says something, and is refused unless `code` is 0."""

    to: Any
    message: str
    given: tuple[str, ...] = ()
    loss: float = 1.0  # of every step
    code: int = 2


@dataclasses.dataclass(frozen=True)
class As:
    """The same class declares the field for another algorithm, whose code for it this one takes over."""

    algorithm: str


@dataclasses.dataclass(frozen=True)
class Told:
    """JAX is told another value when the processes of a run meet."""

    to: Any
    name: str  # of the argument
