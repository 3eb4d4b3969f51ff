"""The folder that speculators' `prepare_data.py` and vLLM's hidden-states connector write.

`DIR/` is a data set as Hugging Face's `save_to_disk` leaves it (state.json and Arrow streams) with the columns
input_ids and loss_mask; `DIR/hidden_states/hs_{row}.safetensors` holds token_ids [L] and hidden_states [L, 4, E], the
layers ascending and the last one the final residual stream before the target's final norm, or the same as float8 with
hidden_states_scales; `DIR/d2t.npy`, where it
is there, holds a draft vocabulary as offsets. (github.com/vllm-project/speculators, c05b95b)
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from flaxdraft.data.ingest import States, token_row
from flaxdraft.data.templates import Rendered
from flaxdraft.errors import InputError
from flaxdraft.files.safetensors_file import load_safetensors

SCALES = "hidden_states_scales"
_PREPARE = "give the folder that prepare_data.py wrote"


class SpeculatorsFolder:
    """See `ingest.Folder`."""

    last_is_normed = False

    def __init__(self, directory: Path):
        """
        Raises:
            InputError: it is no such folder, or a row is broken.
        """
        self._directory = directory
        self.rows: list[Rendered] = []
        self._numbers: list[int] = []
        self.num_left_out = 0
        for number, row in enumerate(_read_rows(directory)):
            if not row.assistant.any() or not self._path(number).exists():
                self.num_left_out += 1
                continue
            self.rows.append(row)
            self._numbers.append(number)

    def _path(self, number: int) -> Path:
        return self._directory / "hidden_states" / f"hs_{number}.safetensors"

    def name(self, index: int) -> str:
        return str(self._path(self._numbers[index]))

    def states(self, index: int) -> States:
        """
        Raises:
            InputError: the file is damaged, or holds other tokens than the data set.
        """
        tensors, tokens = load_safetensors(self._path(self._numbers[index])), self.rows[index].tokens
        if not {"hidden_states", "token_ids"} <= set(tensors):
            raise InputError(f"{self.name(index)}: holds {sorted(tensors)}, expected hidden_states and token_ids")
        if not np.array_equal(tensors["token_ids"], tokens):
            raise InputError(
                f"{self.name(index)}: its token_ids are not the input_ids of row {self._numbers[index]} of the data "
                "set; it was made from another one: make it again"
            )
        hidden = _widened(tensors, self.name(index))
        if hidden.ndim != 3 or hidden.shape[1] != 4:
            raise InputError(
                f"{self.name(index)}: hidden_states has shape {hidden.shape}, expected [L, 4, E]: three tapped layers "
                "and the last one"
            )
        return States(hidden[:, :3], hidden[:, 3])


def _widened(tensors: dict[str, np.ndarray], where: str) -> np.ndarray:
    """hidden_states [L, 4, E]; bfloat16 of what is stored as float8 with scales."""
    hidden = tensors["hidden_states"]
    if not hidden.dtype.name.startswith("float8"):
        return hidden
    if SCALES not in tensors:
        raise InputError(f"{where}: hidden_states are float8 and their scales ({SCALES}) are not there")
    scales = tensors[SCALES].astype(np.float32)
    while scales.ndim < hidden.ndim:  # of a token, or of a token's layer
        scales = scales[..., None]
    try:
        return (hidden.astype(np.float32) * scales).astype(ml_dtypes.bfloat16)
    except ValueError as error:
        raise InputError(
            f"{where}: {SCALES} has shape {tensors[SCALES].shape}, hidden_states {hidden.shape}; expected one scale "
            "for each token, or for each of its layers"
        ) from error


def _read_rows(directory: Path):
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise InputError(f"{directory}: reading Arrow needs pyarrow; pip install 'flaxdraft[parquet]'") from error
    state = directory / "state.json"
    try:
        files = [entry["filename"] for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
        number = 0
        for file in files:
            with pyarrow.memory_map(str(directory / file)) as source, pyarrow.ipc.open_stream(source) as stream:
                for batch in stream:
                    for row in batch.select(["input_ids", "loss_mask"]).to_pylist():
                        where = f"{directory} row {number}"
                        yield token_row(np.asarray(row["input_ids"]), np.asarray(row["loss_mask"]), where)
                        number += 1
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, pyarrow.ArrowException) as error:
        raise InputError(f"{directory}: not a data set of save_to_disk ({error}); {_PREPARE}") from error
