"""Breaks the package in many ways, one after another, and says which of them the default tests notice.

    python tests/tools/breaks.py           all of them
    python tests/tools/breaks.py 7 12      these
    python tests/tools/breaks.py --list    their numbers, with what each does; nothing is run

Each is made in a temporary copy of the repository, and the tests named with it are run there. A break is found by its
text, wherever that stands in the package. Exit code 1: one was not noticed and `broken.py` gives no reason for it, or
its text was not found once, or its tests did not run.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from break_terms import Break
from broken import BREAKS

ROOT = Path(__file__).parents[2]
PARTS = ("flaxdraft", "tests", "tools", "experiments", "docs", "pyproject.toml", "README.md")
NOTICED, UNNOTICED = 1, 0  # pytest's exit codes


def pattern(text: str) -> re.Pattern[str]:
    """The text with any white space between its words: lines may be broken elsewhere."""
    return re.compile(r"\s+".join(map(re.escape, text.split())))


def sources(root: Path) -> dict[Path, str]:
    """The package's files."""
    return {path: path.read_text() for path in sorted((root / "flaxdraft").rglob("*.py"))}


def place_of(broken: Break, texts: Mapping[Path, str]) -> Path:
    """The one of the files that holds the text, once.

    Raises:
        LookupError: there are none or several.
    """
    found = pattern(broken.old)
    counts = {path: len(found.findall(text)) for path, text in texts.items()}
    where = [path for path, count in counts.items() if count]
    if [counts[path] for path in where] != [1]:
        names = ", ".join(map(str, where)) or "no file"
        raise LookupError(f"expected one place in the package that says {broken.old!r}, found it in {names}")
    return where[0]


def outcome(broken: Break, root: Path) -> tuple[bool, str]:
    """Whether all is as it should be with a break, and what to say of it."""
    try:
        path = place_of(broken, sources(root))
    except LookupError as error:
        return False, f"NOT FOUND  {error}"
    whole = path.read_text()
    path.write_text(pattern(broken.old).sub(lambda _: broken.new, whole))
    try:
        command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "-p", "no:cacheprovider", *broken.tests]
        environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    finally:
        path.write_text(whole)
    if done.returncode == NOTICED:
        first = re.search(r"^(FAILED|ERROR) (\S+)", done.stdout, re.M)
        return True, f"noticed    by {first[2] if first else 'the tests'}"
    if done.returncode == UNNOTICED:
        return bool(broken.why), f"UNNOTICED  {broken.why or 'by ' + ' '.join(broken.tests)}"
    return False, f"NOT RUN    pytest ended with {done.returncode}: {(done.stdout + done.stderr).strip()[-400:]}"


def copied(to: Path) -> Path:
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy2(source, to / name)
    return to


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tests/tools/breaks.py", description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*", type=int, help="of the breaks to make; all by default")
    parser.add_argument("--list", action="store_true", help="say what there is")
    arguments = parser.parse_args(argv)
    numbers = arguments.numbers or range(1, len(BREAKS) + 1)
    if arguments.list:
        for number in numbers:
            print(f"{number:3}  {BREAKS[number - 1].what}")
        return 0
    good = True
    with tempfile.TemporaryDirectory(prefix="flaxdraft-breaks-") as folder:
        root = copied(Path(folder) / "repository")
        os.environ.setdefault("FLAXDRAFT_TEST_CACHE", str(Path(folder) / "compiled"))
        for number in numbers:
            start = time.monotonic()
            fine, said = outcome(BREAKS[number - 1], root)
            good &= fine
            print(f"{number:3}  {BREAKS[number - 1].what}\n     {said}  ({time.monotonic() - start:.0f} s)", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
