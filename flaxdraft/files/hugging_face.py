"""A Hugging Face model directory: config.json, safetensors (one file or many with an index), tokenizer.

config.json is read as it is: new model types are unknown to transformers. Block-wise float8 weights (DeepSeek-V3, R1
and K2 as published) and MXFP4 (gpt-oss) are dequantised slice by slice while they are read.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from flaxdraft.errors import InputError
from flaxdraft.files import mxfp4
from flaxdraft.files.json_files import read_json_object
from flaxdraft.files.safetensors_file import SafetensorsFile
from flaxdraft.files.through_an_engine import THROUGH_AN_ENGINE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GENERATION = "generation_config.json"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_SCALES = "_scale_inv"
# What each float8 is: looking it up is quicker than ml_dtypes' conversion, and lets other threads work.
_VALUES = {
    np.dtype(kind): np.arange(256, dtype=np.uint8).view(kind).astype(np.float32)
    for kind in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
}


class HFDescription:
    """config.json and the tokenizer of a model directory, whose weights need not be there."""

    def __init__(self, directory: Path):
        """
        Raises:
            InputError: there is no config.json that can be read.
        """
        self.origin = str(directory)
        self.path = directory
        self.config = read_config(directory)

    def end_tokens(self) -> list[int]:
        """Ids that end an answer, by config.json and generation_config.json.

        Raises:
            InputError: a file cannot be read, or what it names are no ids.
        """
        named = {"config.json": [self.config, self.config.get("text_config")]}
        if (self.path / GENERATION).exists():
            named[GENERATION] = [_read_json(self.path / GENERATION)]
        found = []
        for name, configs in named.items():
            for config in configs:
                value = config.get("eos_token_id") if isinstance(config, dict) else None
                ids = value if isinstance(value, list) else [] if value is None else [value]
                if not all(type(token) is int and token >= 0 for token in ids):
                    raise InputError(
                        f"{self.path / name}: eos_token_id: found {value!r}, expected a token id or a list"
                    )
                found += ids
        return found

    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """The tokenizer with its chat template, None where the directory has none.

        Raises:
            InputError: its files cannot be read.
        """
        if not (self.path / "tokenizer.json").exists():
            return None
        from transformers import PreTrainedTokenizerFast  # the import takes seconds

        try:
            return PreTrainedTokenizerFast.from_pretrained(str(self.path), local_files_only=True)
        except Exception as error:  # the tokenizers library raises nothing narrower
            raise InputError(f"{self.path}: its tokenizer cannot be read ({error}); fetch it again") from error


class HFDirectory(HFDescription):
    """A `leaves.TensorSource`; nothing is read before it is asked for."""

    def __init__(self, directory: Path):
        """
        Raises:
            InputError: a file is missing, cut or altered, the index and the files disagree, or the weights are
                quantised in a way that is not supported.
        """
        super().__init__(directory)
        self._files = self._open()
        quantisation = self.config.get("quantization_config") or {}
        is_mxfp4 = quantisation.get("quant_method") == mxfp4.METHOD
        self._mxfp4 = mxfp4.MXFP4Tensors(self._files) if is_mxfp4 else None
        is_float8 = quantisation and not is_mxfp4
        self._block = _block_size(quantisation, directory / "config.json") if is_float8 else None

    def _open(self) -> dict[str, SafetensorsFile]:
        if not (self.path / INDEX).exists():
            if not (self.path / SINGLE).exists():
                raise InputError(
                    f"{self.path}: holds neither {SINGLE} nor {INDEX}; other formats are not read. {THROUGH_AN_ENGINE}"
                )
            file = SafetensorsFile(self.path / SINGLE)
            return dict.fromkeys(file.entries, file)
        index = self.path / INDEX
        where = _read_json(index).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
            raise InputError(f"{index}: weight_map: expected a file name for each tensor; fetch it again")
        files = {}
        for name in sorted(set(where.values())):
            path = self.path / name
            if path.name != name or path.suffix != ".safetensors":  # others are no part of the model's digest
                raise InputError(
                    f"{index}: names {name!r}, which is outside the directory or no .safetensors file; fetch it again"
                )
            if not path.is_file():
                raise InputError(f"{index}: names {name}, which is not there; fetch it, or the whole model, again")
            files[name] = SafetensorsFile(path)
        held: dict[str, str] = {}
        for file_name, file in files.items():
            for tensor in file.entries:
                if tensor in held:
                    raise InputError(
                        f"{self.path}: {tensor} is in {held[tensor]} and in {file_name}; fetch the model again"
                    )
                held[tensor] = file_name
        for tensor, name in where.items():
            if tensor not in files[name].entries:
                raise InputError(f"{index}: says that {tensor} is in {name}, which does not hold it; fetch it again")
        return {tensor: files[name] for tensor, name in held.items()}

    def names(self) -> list[str]:
        if self._mxfp4 is not None:
            return self._mxfp4.names()
        return [name for name in self._files if not (self._block and name.endswith(_SCALES))]

    def shape(self, name: str) -> tuple[int, ...]:
        if self._mxfp4 is not None and name in self._mxfp4:
            return self._mxfp4.shape(name)
        return self._files[name].entries[name].shape

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """That part of a tensor; float32 where it is stored as float8 with scales, bfloat16 where it is MXFP4.

        Raises:
            InputError: float8 without its scales, or a type that no weight has.
        """
        if self._mxfp4 is not None and name in self._mxfp4:
            return self._mxfp4.read(name, index)
        file = self._files[name]
        values = file.read(name, index)
        if not file.entries[name].dtype.startswith("F8"):
            return values
        scales = name + _SCALES
        if self._block is None or scales not in self._files:
            raise InputError(f"{file.path}: {name} is float8 and its scales ({scales}) are not there")
        return _VALUES[values.dtype][values.view(np.uint8)] * self._scales(name, scales, index)

    def _scales(self, name: str, scales: str, index: tuple[slice, ...]) -> np.ndarray:
        """One scale for each value of a slice, from one for each block."""
        assert self._block is not None
        shape, blocks, cut, inside = self.shape(name), [], [], []
        for part, size, block in zip(index, shape, self._block, strict=True):
            start, stop, _ = part.indices(size)
            blocks.append(math.ceil(size / block))
            cut.append(slice(start // block, math.ceil(stop / block)))
            inside.append(slice(start % block, start % block + stop - start))
        file = self._files[scales]
        if file.entries[scales].shape != tuple(blocks):
            raise InputError(f"{file.path}: {scales} has shape {file.entries[scales].shape}, expected {tuple(blocks)}")
        found = file.read(scales, tuple(cut)).astype(np.float32)
        for axis, block in enumerate(self._block):
            found = np.repeat(found, block, axis=axis)
        return found[tuple(inside)]


def read_config(directory: Path) -> dict[str, Any]:
    """
    Raises:
        InputError: the directory has no config.json that can be read.
    """
    return _read_json(directory / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, "a model directory needs it", "fetch it again")


def _block_size(quantisation: dict[str, Any], origin: Path) -> tuple[int, int]:
    method, block = quantisation.get("quant_method"), quantisation.get("weight_block_size")
    if method != "fp8":
        raise InputError(
            f"{origin}: quantization_config.quant_method: found {method!r}, only 'fp8' with block scales and "
            f"'mxfp4' can be read; use the model's unquantised weights. {THROUGH_AN_ENGINE}"
        )
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        raise InputError(
            f"{origin}: quantization_config.weight_block_size: found {block!r}, expected two block sizes. "
            f"{THROUGH_AN_ENGINE}"
        )
    return tuple(block)
