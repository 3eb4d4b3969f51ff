"""Weights stored as MXFP4 (OCP Microscaling Formats 1.0, https://www.opencompute.org/documents/
ocp-microscaling-formats-mx-v1-0-spec-final-pdf), widened slice by slice while they are read.

gpt-oss stores a tensor NAME [experts, in, out] as NAME_blocks [experts, out, in / 32, 16], two numbers of 4 bits a
byte, the lower half first, and NAME_scales [experts, out, in / 32], the exponent of each 32 numbers. bfloat16 holds
every product exactly.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from flaxdraft.errors import InputError
from flaxdraft.files.safetensors_file import SafetensorsFile

METHOD = "mxfp4"  # quantization_config.quant_method
_BLOCKS, _SCALES = "_blocks", "_scales"
_BLOCK = 32  # numbers of one scale
_ROWS = 64  # are turned at a time: numpy turns a large matrix column by column, which misses the cache at every value


def _pairs() -> np.ndarray:
    """uint32 [256 * 256]: for an exponent and a byte, the two bfloat16 numbers side by side."""
    positive = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    numbers = np.concatenate([positive, -positive])
    byte = np.arange(256)
    exponents = np.ldexp(np.float32(1), np.arange(256) - 127)
    exponents[255] = np.nan  # as the format has it
    products = exponents[:, None, None] * np.stack([numbers[byte & 15], numbers[byte >> 4]], axis=-1)
    return np.ascontiguousarray(products.astype(ml_dtypes.bfloat16)).view(np.uint32).ravel()


with np.errstate(over="ignore"):
    _PAIRS = _pairs()


class MXFP4Tensors:
    """Those of a directory that are stored so, by the names that they have elsewhere."""

    def __init__(self, files: Mapping[str, SafetensorsFile]):
        """
        Args:
            files: the file of each tensor.

        Raises:
            InputError: blocks have no scales, or none that fit.
        """
        self._files = files
        self._shapes = {
            name.removesuffix(_BLOCKS): self._shape(name.removesuffix(_BLOCKS))
            for name in files
            if name.endswith(_BLOCKS)
        }

    def _shape(self, name: str) -> tuple[int, ...]:
        file = self._files[name + _BLOCKS]
        blocks = file.entries[name + _BLOCKS].shape
        if name + _SCALES not in self._files:
            raise InputError(f"{file.path}: {name}{_BLOCKS} is there and {name}{_SCALES} is not; fetch the model again")
        scales = self._files[name + _SCALES].entries[name + _SCALES].shape
        if len(blocks) != 4 or blocks[3] * 2 != _BLOCK or scales != blocks[:3]:
            raise InputError(
                f"{file.path}: {name}{_BLOCKS} has shape {blocks} and its scales {scales}; expected experts, outputs, "
                f"inputs / {_BLOCK}, {_BLOCK // 2}, and the same without the last; fetch the model again"
            )
        experts, outputs, groups, _ = blocks
        return experts, groups * _BLOCK, outputs

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def names(self) -> list[str]:
        """All tensors of the directory, in the order of its files."""
        named = (name.removesuffix(_BLOCKS) for name in self._files)
        parts = {name + _SCALES for name in self._shapes}
        return [name for name in named if name not in parts]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """That part of a tensor, as bfloat16.

        Raises:
            InputError: it is not stored as bytes.
        """
        experts, inputs, outputs = index
        start, stop, _ = inputs.indices(self._shapes[name][1])
        groups = slice(start // _BLOCK, -(-stop // _BLOCK))
        blocks = self._files[name + _BLOCKS].read_bytes(name + _BLOCKS, (experts, outputs, groups))
        scales = self._files[name + _SCALES].read_bytes(name + _SCALES, (experts, outputs, groups))
        first = start - groups.start * _BLOCK
        out = np.empty((len(blocks), stop - start, blocks.shape[1]), np.uint16)
        for expert in range(len(blocks)):
            for row in range(0, blocks.shape[1], _ROWS):
                rows = slice(row, row + _ROWS)
                at = scales[expert, rows, :, None].astype(np.intp) * 256 + blocks[expert, rows]
                numbers = np.take(_PAIRS, at).reshape(len(at), -1).view(np.uint16)
                out[expert, :, rows] = numbers[:, first : first + stop - start].T
        return out.view(ml_dtypes.bfloat16)
