"""The figures of a run: JSON lines and TensorBoard always, Weights & Biases where asked for."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from flaxdraft.devices import hosts
from flaxdraft.errors import InputError
from flaxdraft.train.step import StepMetrics


def check_wandb(project: str | None) -> None:
    """
    Raises:
        InputError: it is asked for and not installed.
    """
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise InputError("train.wandb: the package is not installed; `pip install wandb`, or leave the field out")


class MetricsLog:
    """Writes in process 0 alone. The JSON lines are cut back to the step from which a run goes on."""

    def __init__(self, directory: Path, step: int, wandb_project: str | None = None):
        self._file = self._board = self._wandb = None
        if not hosts.is_main():
            return
        path = directory / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= step] if step else []
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")
        from tensorboardX import SummaryWriter  # imports PyTorch where it is installed, which takes seconds

        # TensorBoard leaves out what lies behind `purge_step` in older files.
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)
        if wandb_project is not None:
            import wandb  # pyright: ignore[reportMissingImports]  # no extra brings it

            self._wandb = wandb.init(
                project=wandb_project, name=directory.name, dir=str(directory), id=_identity(directory), resume="allow"
            )

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            assert self._board is not None, "both are opened together"
            self._file.close()
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def write(self, step: int, kind: str, figures: dict[str, Any]) -> None:
        """One line; a list is one curve an entry."""
        if self._file is None:
            return
        assert self._board is not None, "both are opened together"
        self._file.write(json.dumps({"step": step, "kind": kind, **figures}) + "\n")
        self._file.flush()
        scalars = {}
        for name, value in figures.items():
            entries = {f"{name}/{i + 1}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
            scalars |= {f"{kind}/{entry}": v for entry, v in entries.items() if np.isfinite(v)}
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)


def _identity(directory: Path) -> str:
    """One run of Weights & Biases for one folder, also after a restart."""
    path = directory / "wandb_id"
    if not path.exists():
        path.write_text(os.urandom(6).hex(), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def training_figures(metrics: StepMetrics) -> dict[str, Any]:
    """Of one step, on the host."""
    return {"loss": float(metrics.loss), "grad_norm": float(metrics.grad_norm), **metrics.sums.figures()}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every complete line of a metrics file; a last line cut by a kill is left out.

    Raises:
        InputError: another line is damaged.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    metrics = []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            continue
        try:
            metrics.append(json.loads(line))
            known = metrics[-1]["kind"] in ("train", "held_out") and metrics[-1]["step"] >= 0
        except (ValueError, TypeError, LookupError):
            known = False
        if not known:
            raise InputError(f"{path} line {number}: damaged; delete that line and run again")
    return metrics
