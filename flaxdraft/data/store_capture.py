"""The target reads conversations and its features go into a store: planned, resumable, one part a host.

Shards are planned before anything is computed, so that a store is the same however often its capture was stopped and
however many hosts share it; a shard that is there is whole. Rows of a shard run by length, which pads them little.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxdraft.data.chat import Rendered
from flaxdraft.data.documents import Document
from flaxdraft.data.store import DTYPES, MANIFEST, PLAN, TARGET, Source, finish, shard_name, write_shard
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Batch, Target
from flaxdraft.progress import bar
from flaxdraft.stages import flatten
from flaxdraft.weights import save_safetensors, write_json

_EXTRA_BYTES = 4 + 1 + 4 + 4  # token, mask, argmax, logsumexp


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which rows lie in which shard, and what the store will take."""

    source: Source
    first_rows: tuple[int, ...]  # of each shard, and behind them the number of rows
    num_tokens: int
    tied: bool

    @property
    def num_bytes(self) -> int:
        """Of the whole store, to within headers."""
        s = self.source
        taps = 3 * s.hidden_size * np.dtype(DTYPES[s.taps_dtype]).itemsize + (12 if s.taps_dtype == "fp8" else 0)
        per_token = taps + s.hidden_size * np.dtype(DTYPES[s.last_dtype]).itemsize + _EXTRA_BYTES
        weights = (1 if self.tied else 2) * s.vocab_size * s.hidden_size * 4
        return per_token * self.num_tokens + weights

    def as_json(self) -> dict[str, Any]:
        return {**self.source.as_json(), "first_rows": [*self.first_rows], "tokens": self.num_tokens}


def make_plan(source: Source, rows: Sequence[Rendered], shard_tokens: int, tied: bool) -> Plan:
    """Consecutive rows, as many a shard as stay within `shard_tokens`, one at least."""
    first_rows, filled = [0], 0
    for number, row in enumerate(rows):
        if filled and filled + len(row.tokens) > shard_tokens:
            first_rows.append(number)
            filled = 0
        filled += len(row.tokens)
    return Plan(source, (*first_rows, len(rows)), sum(len(row.tokens) for row in rows), tied)


def start(directory: Path, plan: Plan) -> list[int]:
    """Writes the plan, or checks it against the one that is there; returns the shards that are still missing.

    Raises:
        InputError: the directory holds another plan (every differing field is listed), cannot be written, or the disk
            has no room for what is missing.
    """
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


def capture(
    directory: Path, plan: Plan, rows: Sequence[Rendered], target: Target, *, batch_tokens: int, part: tuple[int, int]
) -> bool:
    """Writes the missing shards of one part; part 0 also the target's weights and, once the shards of all parts are
    there, index and manifest.

    Args:
        batch_tokens: padded tokens of one forward pass.
        part: (i, n): shards i, i + n, i + 2 n, ... are this host's.

    Returns:
        Whether the store is complete.

    Raises:
        InputError: see `start`; a feature is not finite.
    """
    missing = [i for i in start(directory, plan) if i % part[1] == part[0]]
    spans = [range(plan.first_rows[i], plan.first_rows[i + 1]) for i in missing]
    with bar("rows", sum(map(len, spans))) as progress:
        done, began = 0, time.monotonic()
        for index, span in zip(missing, spans, strict=True):
            stored = {}
            for members in _batches([(i, len(rows[i].tokens)) for i in span], batch_tokens):
                stored |= _read(target, rows, members)
                done += len(members)
                progress.advance(len(members), f"{done / (time.monotonic() - began):.1f} rows/s")
            write_shard(directory, index, [stored[i] for i in span], plan.source)
    if part[0] == 0 and not (directory / TARGET).exists():
        tensors = {"embedding": target.embedding(), "final_norm": target.final_norm()}
        tensors |= {} if plan.tied else {"head": target.head()}
        save_safetensors(directory / TARGET, {name: np.asarray(x, np.float32) for name, x in tensors.items()})
    num_shards = len(plan.first_rows) - 1
    complete = all((directory / shard_name(i)).exists() for i in range(num_shards))
    if complete and part[0] == 0 and not (directory / MANIFEST).exists():
        finish(directory, plan.source, num_shards)
    return complete and (directory / MANIFEST).exists()


def _padded(length: int) -> int:
    """Few distinct lengths, so that few programs are compiled: eighths of the next power of two."""
    step = max(1 << max(length.bit_length() - 3, 0), 32)
    return -(-length // step) * step


def _batches(sizes: list[tuple[int, int]], batch_tokens: int) -> list[list[int]]:
    """Rows by padded length; each batch holds rows of one padded length, at most batch_tokens of them together."""
    by_length: dict[int, list[int]] = {}
    for row, length in sizes:
        by_length.setdefault(_padded(length), []).append(row)
    batches = []
    for length, members in sorted(by_length.items()):
        count = max(batch_tokens // length, 1)
        batches += [members[at : at + count] for at in range(0, len(members), count)]
    return batches


def _read(target: Target, rows: Sequence[Rendered], members: list[int]) -> dict[int, Document]:
    """One forward pass; the batch is filled up to a power of two rows."""
    length = max(_padded(len(rows[i].tokens)) for i in members)
    shape = (1 << (len(members) - 1).bit_length(), length)
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for at, i in enumerate(members):
        tokens[at, : len(rows[i].tokens)] = rows[i].tokens
        segments[at, : len(rows[i].tokens)] = 1
    positions = np.tile(np.arange(length, dtype=np.int32), (shape[0], 1))
    features = jax.device_get(target.features(Batch(tokens, segments > 0, segments, positions)))
    out = {}
    for at, i in enumerate(members):
        inside = (at, slice(len(rows[i].tokens)))
        cut = jax.tree.map(lambda x, inside=inside: x[inside], features)
        if not (np.isfinite(cut.taps_BT3E).all() and np.isfinite(cut.last_BTE).all()):
            raise InputError(
                f"row {i}: the target's features are not finite; its weights or its dtype do not hold them"
            )
        out[i] = Document(rows[i].tokens, rows[i].assistant, cut)
    return out
