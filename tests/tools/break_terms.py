"""What the lists of `breaks.py` are made of."""

from typing import NamedTuple


class Break(NamedTuple):
    what: str
    old: str  # stands once in the package; white space may differ
    new: str
    tests: tuple[str, ...]  # arguments of pytest
    why: str = ""  # it may go unnoticed


def wire(*fields: str) -> tuple[str, ...]:
    """Rows of test_wire.py."""
    return ("tests/test_wire.py", "-k", " or ".join(f"[{field}]" for field in fields))


def of(file: str, name: str = "") -> tuple[str, ...]:
    return (f"tests/{file}.py", *(("-k", name) if name else ()))
