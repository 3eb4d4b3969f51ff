"""The feature store: what a frozen target says about many rows, on disk, with random access by row.

A directory of
- `plan.json`: what the store is made of and from, written first; a capture that was stopped goes on by it;
- `shard-NNNNN.safetensors`: tokens, assistant mask and features of consecutive rows, end to end;
- `target.safetensors`: the target's embedding, head and final norm, so that training needs no target;
- `index.safetensors`: tokens, supervised tokens and checksum of every row; how often each token is supervised;
- `manifest.json`: written last, with the sizes and checksums of all other files. Without it there is no store.

Every file is written under a temporary name and renamed. Nothing is trusted: a store is opened only if it is the one
that its manifest describes and that the caller expects, and each row is checked when it is read.

Shape letters: N rows, L tokens of a row, T tokens of a shard, E target width, V target vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import safetensors.numpy

from flaxdraft.data.documents import Document
from flaxdraft.errors import InputError
from flaxdraft.files.json_files import write_json
from flaxdraft.files.safetensors_file import Entry, SafetensorsFile, load_safetensors
from flaxdraft.interfaces import Features

SCHEMA = 1
TAP_CONVENTION = "residual stream after these layers (0-based), un-normed; last hidden state after the final norm"
MANIFEST, PLAN, INDEX, TARGET = "manifest.json", "plan.json", "index.safetensors", "target.safetensors"
_FP8 = ml_dtypes.float8_e4m3fn
_FP8_MAX = float(ml_dtypes.finfo(_FP8).max)
_STORED = {"I32": np.int32, "U8": np.uint8, "F32": np.float32, "BF16": ml_dtypes.bfloat16}  # by the format's names
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "fp8": _FP8}


@dataclasses.dataclass(frozen=True)
class Source:
    """What the features come from. Two stores with equal sources hold the same numbers."""

    target: str  # digest of the target's weights and configuration
    tokenizer: str  # digest of the tokenizer and its chat template
    data: str  # digest of the conversations and how they were rendered
    compute_dtype: str  # of the target's products
    tap_layers: tuple[int, ...]
    hidden_size: int
    vocab_size: int
    taps_dtype: str  # bfloat16, float32, or fp8 with one scale for each tapped state of a token
    last_dtype: str  # bfloat16 or float32
    # Arguments that the chat template was given; None where another program rendered the rows, and did not say.
    template: Mapping[str, Any] | None = dataclasses.field(default_factory=dict)
    date: str | None = None  # that it wrote, if it writes one

    def as_json(self) -> dict[str, Any]:
        fields = {name: value for name, value in dataclasses.asdict(self).items() if (name, value) != ("date", None)}
        return {"schema": SCHEMA, "taps": TAP_CONVENTION, **fields, "tap_layers": [*self.tap_layers]}


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"


def save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file, whole or not at all. What a kill leaves has the file's name and `.tmp` behind it, so that the
    next run writes over it; safetensors' own writing to disk leaves files of random names."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(safetensors.numpy.save(tensors))
    os.replace(temporary, path)


def quantise(taps_TKE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """fp8 (e4m3) with a float32 scale for each tapped state of each token."""
    wide = taps_TKE.astype(np.float32)
    scale_TK = np.maximum(np.abs(wide).max(axis=-1), 1e-12) / _FP8_MAX
    return (wide / scale_TK[..., None]).astype(_FP8), scale_TK.astype(np.float32)


def write_shard(directory: Path, index: int, rows: Sequence[Document], source: Source) -> None:
    """One shard, whole or not at all."""
    join = lambda name: np.concatenate([getattr(row.features, name) for row in rows])  # noqa: E731
    tensors = {
        "tokens": np.concatenate([row.tokens for row in rows]).astype(np.int32),
        "assistant": np.concatenate([row.assistant for row in rows]).astype(np.uint8),
        "lengths": np.array([len(row.tokens) for row in rows], np.int32),
        "last": join("last_BTE").astype(DTYPES[source.last_dtype]),
        "argmax": join("argmax_BT").astype(np.int32),
        "logsumexp": join("logsumexp_BT").astype(np.float32),
    }
    taps = join("taps_BTKE")
    if source.taps_dtype == "fp8":
        narrow, tensors["tap_scales"] = quantise(taps)
        tensors["taps"] = narrow.view(np.uint8)  # the format's numpy side knows no fp8
    else:
        tensors["taps"] = taps.astype(DTYPES[source.taps_dtype])
    save(directory / shard_name(index), tensors)


def finish(directory: Path, source: Source, num_shards: int) -> None:
    """Index and manifest over shards that are all there.

    Raises:
        InputError: a shard is missing or damaged.
    """
    lengths, supervised, checksums, shards = [], [], [], []
    counts_V = np.zeros(source.vocab_size, np.int64)
    for index in range(num_shards):
        path = directory / shard_name(index)
        tensors = load_safetensors(path)
        ends = np.cumsum(tensors["lengths"])
        lengths.append(tensors["lengths"])
        spans = zip(ends - lengths[-1], ends, strict=True)
        supervised.append(np.add.reduceat(tensors["assistant"].astype(np.int32), ends - lengths[-1]))
        checksums.append([_checksum(_slices(tensors, start, end)) for start, end in spans])
        counts_V += np.bincount(tensors["tokens"][tensors["assistant"] > 0], minlength=source.vocab_size)
        shards.append({"file": path.name, "rows": len(ends), **_measure(path)})
    index = {
        "lengths": np.concatenate(lengths),
        "supervised": np.concatenate(supervised),
        "checksums": np.concatenate(checksums).astype(np.uint32),
        "token_counts": counts_V,
    }
    save(directory / INDEX, index)
    files = {name: _measure(directory / name) for name in (INDEX, TARGET)}
    write_json(directory / MANIFEST, {**source.as_json(), "shards": shards, "files": files})


def _measure(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


_ROW_TENSORS = ("tokens", "assistant", "taps", "tap_scales", "last", "argmax", "logsumexp")


def _slices(tensors: Any, start: int, end: int) -> dict[str, np.ndarray]:
    return {name: tensors[name][start:end] for name in _ROW_TENSORS if name in tensors}


def _checksum(row: dict[str, np.ndarray]) -> int:
    value = 0
    for array in row.values():
        value = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data, value)
    return value


class _Shard:
    """What lies where in a shard. Its rows are read, not mapped: pages of a mapped file would count as this process's
    memory, and a store is larger than that."""

    def __init__(self, path: Path):
        """
        Raises:
            InputError: it cannot be opened, or its header is damaged.
        """
        entries = SafetensorsFile(path).entries
        self.path, self.entries = path, {name: entries[name] for name in _ROW_TENSORS if name in entries}

    def read(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Those tokens of every tensor."""
        with self.path.open("rb", buffering=0) as file:
            return {name: _read(file, entry, start, stop) for name, entry in self.entries.items()}


def _read(file: BinaryIO, entry: Entry, start: int, stop: int) -> np.ndarray:
    tail, dtype = entry.shape[1:], np.dtype(_STORED[entry.dtype])
    size = math.prod(tail) * dtype.itemsize
    file.seek(entry.start + start * size)
    return np.frombuffer(file.read((stop - start) * size), dtype).reshape(-1, *tail)


class FeatureStore:
    """Random access to the rows of a finished store."""

    def __init__(self, directory: str | Path, expected: dict[str, Any] | None = None):
        """
        Args:
            expected: fields of the manifest that must have these values (target, tokenizer, tap_layers, ...).

        Raises:
            InputError: there is no finished store, it is of another schema, target, tokenizer or tap convention, or a
                file is missing, of another size, altered (index and target), or not in the manifest.
        """
        self.directory = Path(directory).expanduser()
        self.manifest = _read_manifest(self.directory)
        for name, value in {"schema": SCHEMA, "taps": TAP_CONVENTION, **(expected or {})}.items():
            if name == "template" and _template_of(self.manifest) in (None, value):
                continue
            if self.manifest.get(name) != value:
                raise InputError(
                    f"{self.directory / MANIFEST}: {name} is {self.manifest.get(name)!r}, expected {value!r}; "
                    "the store was made by another version, or from another target, tokenizer or data.template: "
                    "capture again"
                )
        self._check_files()
        index = load_safetensors(self.directory / INDEX)
        self.lengths: np.ndarray = index["lengths"]
        self.supervised: np.ndarray = index["supervised"]
        self.token_counts: np.ndarray = index["token_counts"]
        self._checksums = index["checksums"]
        sizes = [shard["rows"] for shard in self.manifest["shards"]]
        self._first_rows = np.concatenate([[0], np.cumsum(sizes)])
        if not self._first_rows[-1] == len(self.lengths) == len(self._checksums):
            raise InputError(
                f"{self.directory / INDEX}: {len(self.lengths)} rows, the shards hold {self._first_rows[-1]}; "
                "capture again"
            )
        starts = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)[:-1]])
        first = np.minimum(self._first_rows[:-1], max(len(starts) - 1, 0))
        self._starts = starts - np.repeat(starts[first], sizes)
        self._open = lru_cache(maxsize=1024)(_Shard)

    def _check_files(self) -> None:
        named = {shard["file"]: shard for shard in self.manifest["shards"]} | self.manifest["files"]
        for name, record in named.items():
            path = self.directory / name
            if not path.is_file():
                raise InputError(f"{path}: missing; the manifest names it. Put it back, or capture again")
            if path.stat().st_size != record["bytes"]:
                raise InputError(
                    f"{path}: {path.stat().st_size} bytes, the manifest says {record['bytes']}; it was cut or "
                    "replaced: remove it and capture again"
                )
        for name in self.manifest["files"]:
            if _measure(self.directory / name)["sha256"] != named[name]["sha256"]:
                raise InputError(f"{self.directory / name}: altered since it was written; capture again")
        for path in self.directory.glob("shard-*.safetensors"):
            if path.name not in named:
                raise InputError(f"{path}: not in the manifest; it belongs to another store: remove it")

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def digest(self) -> str:
        """Of the tokens and masks."""
        return self.manifest["data"]

    @property
    def date(self) -> str | None:
        """That the chat template wrote into its rows, if it writes one."""
        return self.manifest.get("date")

    @property
    def tap_layers(self) -> tuple[int, ...]:
        return tuple(self.manifest["tap_layers"])

    def row(self, index: int) -> Document:
        """One row; no other row is read.

        Raises:
            InputError: its bytes are not those that were written; shard and row are named.
        """
        shard = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        path = self.directory / self.manifest["shards"][shard]["file"]
        start = int(self._starts[index])
        try:
            arrays = self._open(path).read(start, start + int(self.lengths[index]))
        except (OSError, ValueError, LookupError) as error:
            raise InputError(f"{path}: not a readable shard ({error}); remove it and capture again") from error
        if _checksum(arrays) != self._checksums[index]:
            inside = index - int(self._first_rows[shard])
            raise InputError(
                f"{path}: row {inside} (row {index} of the store) is not what was written there; the file was altered. "
                "Remove it and capture again"
            )
        taps = arrays["taps"]
        if "tap_scales" in arrays:
            taps = taps.view(_FP8).astype(np.float32) * arrays["tap_scales"][..., None]
        features = Features(taps, arrays["last"], arrays["argmax"], arrays["logsumexp"])
        return Document(arrays["tokens"], arrays["assistant"].astype(bool), features)

    def target(self) -> dict[str, np.ndarray]:
        """`embedding` [V, E], `head` [V, E] (absent where tied) and `final_norm` [E] of the target."""
        return load_safetensors(self.directory / TARGET)


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        state = "a capture that has not finished; run it again" if (directory / PLAN).exists() else "no feature store"
        raise InputError(f"{directory}: {state} ({MANIFEST} is missing)") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable ({error}); capture again") from error
    shards_ok = isinstance(manifest, dict) and all(
        isinstance(part, dict) and isinstance(part.get("bytes"), int) and isinstance(part.get("sha256"), str)
        for part in [*_list(manifest.get("shards")), *_dict(manifest.get("files")).values()]
    )
    complete = shards_ok and all(
        isinstance(shard.get("file"), str) and isinstance(shard.get("rows"), int) for shard in manifest["shards"]
    )
    if not complete or not {INDEX, TARGET} <= set(manifest["files"]):
        raise InputError(f"{path}: not the manifest of a feature store; capture again")
    return manifest


def _template_of(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """Stores of earlier versions were made without arguments."""
    return manifest.get("template", {})


def _list(value: Any) -> list:
    return value if isinstance(value, list) and value else [None]


def _dict(value: Any) -> dict:
    return value if isinstance(value, dict) and value else {"": None}
