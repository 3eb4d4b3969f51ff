"""What made a checkpoint: versions of the libraries, the revision of the code, the devices."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

_LIBRARIES = ("flaxdraft", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain")


@functools.cache
def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree
            found[name] = "not installed"
    return found


@functools.cache
def git_revision() -> str | None:
    """The commit of the code that runs, `+changes` behind it where files differ; None outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def topology(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    return {
        "devices": mesh.size, "processes": jax.process_count(), "kind": mesh.devices.flat[0].device_kind,
        "mesh": dict(mesh.shape),
    }  # fmt: skip
