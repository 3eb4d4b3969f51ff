"""SpecForge's files of hidden states: `.ckpt` (torch.save of a dict of tensors) and `.ckpt.gz`.

Such a file is a pickle, which can run any code when it is loaded. It is read with weights_only, which builds tensors
and containers and refuses everything else. (SpecForge a6b6b023, `specforge_hidden_states_v1`)
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch  # pyright: ignore[reportMissingImports]  # of the extra `convert` alone

from flaxdraft.data.ingest import States, token_row
from flaxdraft.data.templates import Rendered
from flaxdraft.errors import InputError

SUFFIXES = (".ckpt", ".ckpt.gz")
ROWS_IN_A_FOLDER = 2000
MAP = Path("vocab_mapping") / "vocab_mapping.pt"
_NARROW = {
    torch.bfloat16: ml_dtypes.bfloat16, torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    torch.float8_e5m2: ml_dtypes.float8_e5m2,
}  # fmt: skip
_SHAPES = {"input_ids": 1, "loss_mask": 1, "aux_hidden_state": 3, "hidden_state": 3}  # and their axes


def load(path: Path) -> Any:
    """What a file of torch.save holds, on the host; tensors of an uncompressed one are mapped, not read.

    Raises:
        InputError: it cannot be read, or holds something that is neither a tensor nor a container of tensors; nothing
            of it has been executed then.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        raise InputError(f"torch {torch.__version__}: loads files unsafely; pip install 'flaxdraft[convert]'")
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                return torch.load(io.BytesIO(file.read()), map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: holds more than tensors, and was not loaded: a file of hidden states has no need of that, a "
            "malicious one has. Get the files from somebody you trust"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, zlib.error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: not a readable torch file ({reason}); remove it and make it again") from error


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same bits; numpy's own library knows neither bfloat16 nor float8."""
    if tensor.dtype in _NARROW:
        bits = torch.int16 if tensor.dtype == torch.bfloat16 else torch.uint8
        return tensor.view(bits).numpy().view(_NARROW[tensor.dtype])
    return tensor.numpy()


def as_torch(array: np.ndarray) -> torch.Tensor:
    """The inverse of `as_numpy`."""
    array = array.copy()  # torch wants to own what it may write to
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


class SpecForgeFolder:
    """See `ingest.Folder`. Rows are the files, by their paths. Its last states are from after the final norm."""

    last_is_normed = True

    def __init__(self, directory: Path):
        """
        Raises:
            InputError: it holds no such files, or one is damaged.
        """
        found = [Path(root) / name for root, _, names in os.walk(directory) for name in names]
        paths = sorted(path for path in found if path.name.endswith(SUFFIXES))
        if not paths:
            raise InputError(f"{directory}: holds no {' or '.join(SUFFIXES)} files; give SpecForge's output folder")
        self._paths: list[Path] = []
        self.rows: list[Rendered] = []
        for path in paths:
            row = _tokens(_record(path), path)
            if row.assistant.any():
                self._paths.append(path)
                self.rows.append(row)
        self.num_left_out = len(paths) - len(self.rows)

    def name(self, index: int) -> str:
        return str(self._paths[index])

    def states(self, index: int) -> States:
        """
        Raises:
            InputError: the file is damaged.
        """
        record, length = _record(self._paths[index]), len(self.rows[index].tokens)
        taps, last = (as_numpy(record[name])[0, :length] for name in ("aux_hidden_state", "hidden_state"))
        if taps.shape[-1] % 3:
            raise InputError(f"{self.name(index)}: aux_hidden_state has width {taps.shape[-1]}, expected three states")
        return States(taps.reshape(len(taps), 3, -1), last)


def _has_axes(value: Any, num: int) -> bool:
    """Of a tensor; of three the first holds one row."""
    return isinstance(value, torch.Tensor) and value.ndim == num and (num != 3 or len(value) == 1)


def _record(path: Path) -> dict[str, torch.Tensor]:
    record = load(path)
    for name, axes in _SHAPES.items():
        tensor = record.get(name) if isinstance(record, dict) else None
        if not _has_axes(tensor, axes):
            expected = {1: "[L]", 3: "[1, L, ...]"}[axes]
            raise InputError(f"{path}: {name}: expected a tensor {expected}, found {_brief(tensor)}")
    return record


def _brief(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(type(value).__name__)


def _tokens(record: dict[str, torch.Tensor], path: Path) -> Rendered:
    tokens, mask = as_numpy(record["input_ids"]), as_numpy(record["loss_mask"])
    row = token_row(tokens, mask, str(path))
    # Batches were padded with id 0 behind each row, and the target ran over that too. Nothing reads what stands there.
    used = np.flatnonzero((row.tokens != 0) | row.assistant)
    end = int(used[-1]) + 1 if used.size else 1
    return Rendered(row.tokens[:end], row.assistant[:end])


def vocabulary_offsets(directory: Path) -> np.ndarray | None:
    """d2t of the folder's draft vocabulary, int64 [W]; None where it has none.

    Raises:
        InputError: the file is damaged, or d2t and t2d disagree.
    """
    path = directory / MAP
    if not path.exists():
        return None
    record = load(path)
    parts: list[Any] = [record.get(name) if isinstance(record, dict) else None for name in ("d2t", "t2d")]
    if not all(_has_axes(part, 1) for part in parts):
        raise InputError(f"{path}: expected two vectors, d2t and t2d")
    d2t, t2d = (part.numpy() for part in parts)
    if not np.array_equal(d2t + np.arange(len(d2t)), np.flatnonzero(t2d)):
        raise InputError(f"{path}: d2t and t2d name different tokens; make the mapping again")
    return d2t.astype(np.int64)
