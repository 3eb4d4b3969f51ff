"""Scripts of this folder, run by a Python that has an engine."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any


def start(python: str | None, script: str, *arguments: str, **how: Any) -> subprocess.Popen:
    """Without what is set for JAX and for this Python's packages.

    Args:
        how: of `subprocess.Popen`.
    """
    assert python is not None, "tests of an engine are skipped without it"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "JAX_"))}
    return subprocess.Popen([python, str(Path(__file__).with_name(script)), *arguments], env=environment, **how)


def told(python: str | None, script: str, folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """What a script makes of the folder: it finds `asked` in asked.json and leaves its answer in told.json."""
    (folder / "asked.json").write_text(json.dumps(asked))
    with start(python, script, str(folder), cwd=folder) as process:
        assert process.wait() == 0, f"{script} failed"
    return json.loads((folder / "told.json").read_text())
