"""Writing a feature store: planned before anything is computed, resumable, one part a host.

The plan says which rows lie in which shard, so that a store is the same however often its making was stopped and
however many hosts shared it; a shard that is there is whole.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxdraft.data.documents import Document
from flaxdraft.data.store import DTYPES, MANIFEST, PLAN, TARGET, Source, finish, save, shard_name, write_shard
from flaxdraft.devices import hosts
from flaxdraft.errors import InputError
from flaxdraft.files.json_files import write_json
from flaxdraft.progress import bar
from flaxdraft.stages.same_inputs import flatten

_EXTRA_BYTES = 4 + 1 + 4 + 4  # token, mask, argmax, logsumexp


@dataclasses.dataclass(frozen=True)
class StorePlan:
    """Which rows lie in which shard, and what the store will take."""

    source: Source
    first_rows: tuple[int, ...]  # of each shard, and behind them the number of rows
    num_tokens: int
    tied: bool

    @property
    def num_bytes(self) -> int:
        """Of the whole store, to within headers."""
        s = self.source
        one_tap = s.hidden_size * np.dtype(DTYPES[s.taps_dtype]).itemsize + (4 if s.taps_dtype == "fp8" else 0)
        taps = len(s.tap_layers) * one_tap
        per_token = taps + s.hidden_size * np.dtype(DTYPES[s.last_dtype]).itemsize + _EXTRA_BYTES
        weights = (1 if self.tied else 2) * s.vocab_size * s.hidden_size * 4
        return per_token * self.num_tokens + weights

    def as_json(self) -> dict[str, Any]:
        return {**self.source.as_json(), "first_rows": [*self.first_rows], "tokens": self.num_tokens}


def make_plan(source: Source, lengths: Sequence[int], shard_tokens: int, tied: bool) -> StorePlan:
    """Consecutive rows of those lengths, as many a shard as stay within `shard_tokens`, one at least."""
    first_rows, filled = [0], 0
    for number, length in enumerate(lengths):
        if filled and filled + length > shard_tokens:
            first_rows.append(number)
            filled = 0
        filled += length
    return StorePlan(source, (*first_rows, len(lengths)), sum(lengths), tied)


def start(directory: Path, plan: StorePlan) -> list[int]:
    """Writes the plan, or checks it against the one that is there; returns the shards that are still missing, the same
    ones in every process.

    Raises:
        InputError: the directory holds another plan (every differing field is listed), cannot be written, or the disk
            has no room for what is missing.
    """
    with hosts.main_first(f"plan {directory}"):
        missing = _started(directory, plan)
    return hosts.agree(missing)


def _started(directory: Path, plan: StorePlan) -> list[int]:
    path, wanted = directory / PLAN, plan.as_json()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_json(path, wanted)
        found = json.loads(path.read_text(encoding="utf-8"))
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise InputError(f"{directory}: cannot be written ({error.strerror}); choose another folder") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); remove {directory} to start anew") from error
    there, here = flatten(found), flatten(wanted)
    differing = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
    if differing:
        listed = "; ".join(f"{key}: there {_brief(there.get(key))}, here {_brief(here.get(key))}" for key in differing)
        raise InputError(
            f"{directory}: holds a capture of something else ({listed}); give another folder, or remove it to start "
            "anew"
        )
    num_shards = len(plan.first_rows) - 1
    missing = [i for i in range(num_shards) if not (directory / shard_name(i)).exists()]
    needed = plan.num_bytes * len(missing) // num_shards
    if needed > free:
        raise InputError(
            f"{directory}: {needed / 1e9:.1f} GB are still to be written, {free / 1e9:.1f} GB are free; give a folder "
            "on another disk, or --taps-dtype fp8"
        )
    return missing


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def fill(
    directory: Path,
    plan: StorePlan,
    read: Callable[[range, Callable[[int], None]], list[Document]],
    weights: Callable[[], dict[str, np.ndarray]],
    part: tuple[int, int],
) -> bool:
    """Writes the missing shards of one part; part 0 also the target's weights and, once the shards of all parts are
    there, index and manifest. Of many processes all read, and the first one writes.

    Args:
        read: the documents of consecutive rows; it calls its second argument with the number of rows done.
        weights: `embedding`, `head` (unless tied) and `final_norm` of the target.
        part: (i, n): shards i, i + n, i + 2 n, ... are this host's.

    Returns:
        Whether the store is complete.

    Raises:
        InputError: see `start`; whatever `read` raises.
    """
    missing = [i for i in start(directory, plan) if i % part[1] == part[0]]
    spans = [range(plan.first_rows[i], plan.first_rows[i + 1]) for i in missing]
    with bar("rows", sum(map(len, spans))) as progress:
        done, began = 0, time.monotonic()

        def advance(num_rows: int) -> None:
            nonlocal done
            done += num_rows
            progress.advance(num_rows, f"{done / (time.monotonic() - began):.1f} rows/s")

        for index, span in zip(missing, spans, strict=True):
            documents = read(span, advance)
            if hosts.is_main():
                write_shard(directory, index, documents, plan.source)
    if part[0] == 0 and not hosts.agree((directory / TARGET).exists()):
        tensors = weights()
        if hosts.is_main():
            save(directory / TARGET, {name: np.asarray(x, np.float32) for name, x in tensors.items()})
    return hosts.agree(hosts.is_main() and _finished(directory, plan, part))


def _finished(directory: Path, plan: StorePlan, part: tuple[int, int]) -> bool:
    """Whether the store is complete; part 0 writes what makes it so."""
    num_shards = len(plan.first_rows) - 1
    complete = all((directory / shard_name(i)).exists() for i in range(num_shards))
    if complete and part[0] == 0 and not (directory / MANIFEST).exists():
        finish(directory, plan.source, num_shards)
    return complete and (directory / MANIFEST).exists()
