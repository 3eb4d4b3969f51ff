"""Weights across the border: safetensors files and declarative name tables.

A table row is (JAX path, PyTorch key template, transform). A `{i}` in the template stacks layers on axis 0.
Transforms invert bitwise. Reading accounts for every tensor: one that is missing, left over or misshapen is an
error that names it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flaxdraft.errors import InputError

Transform = Literal["copy", "transpose"]
NameTable = Sequence[tuple[str, str, Transform]]


def _apply(array: np.ndarray, transform: Transform) -> np.ndarray:
    return array.T if transform == "transpose" else array


def _path(name: str) -> tuple[str, ...]:
    return tuple(name.split("/"))


def state_from_torch(
    abstract: nnx.State,
    table: NameTable,
    names: Iterable[str],
    get: Callable[[str], np.ndarray],
    num_layers: int,
    origin: str,
) -> nnx.State:
    """Fills an abstract NNX state from PyTorch-named tensors.

    Args:
        abstract: shapes and dtypes (nnx.eval_shape); every leaf must be covered by the table.
        names: the tensors that the file holds; get(name) reads one of them.
        origin: the file, for messages.

    Raises:
        InputError: missing, unexpected or misshapen tensors, all of them listed.
    """
    names = set(names)
    slots = {path: variable for path, variable in nnx.to_flat_state(abstract)}
    used, missing, misshapen, filled = set(), [], [], {}
    for jax_path, template, transform in table:
        variable = slots[_path(jax_path)]
        stacked = "{i}" in template
        keys = [template.format(i=i) for i in range(num_layers)] if stacked else [template]
        missing += [key for key in keys if key not in names]
        used.update(keys)
        want = tuple(variable.shape[1:] if stacked else variable.shape)
        parts = []
        for key in (key for key in keys if key in names):
            part = _apply(get(key), transform)
            if part.shape != want:
                misshapen.append(f"{key}: found {part.shape}, expected {want} ({transform})")
                continue
            parts.append(np.asarray(part, variable.dtype))
        if len(parts) == len(keys):
            filled[_path(jax_path)] = variable.replace(jnp.asarray(np.stack(parts) if stacked else parts[0]))
    extra = sorted(names - used)
    problems = [f"missing: {', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}"] if missing else []
    problems += [f"unexpected: {', '.join(extra[:8])}{' ...' if len(extra) > 8 else ''}"] if extra else []
    problems += [f"wrong shape: {'; '.join(misshapen[:8])}"] if misshapen else []
    if problems:
        raise InputError(f"{origin}: the weights do not fit the configuration. " + " | ".join(problems))
    return nnx.from_flat_state([(path, filled[path]) for path in slots])


def state_to_torch(state: nnx.State, table: NameTable, dtype: Any) -> dict[str, np.ndarray]:
    """The inverse for unstacked tables: PyTorch key -> array of `dtype`."""
    flat = {path: variable for path, variable in nnx.to_flat_state(state)}
    out = {}
    for jax_path, key, transform in table:
        with np.errstate(over="ignore"):  # the caller looks for what overflowed
            array = np.asarray(jax.device_get(flat[_path(jax_path)][...])).astype(dtype)
        out[key] = np.ascontiguousarray(_apply(array, transform))
    return out


def save_safetensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Writes to a temporary name, then renames: a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata=metadata)
    # safetensors makes files that their owner alone can read; a server often runs as somebody else.
    os.umask(umask := os.umask(0))
    temporary.chmod(0o666 & ~umask)
    os.replace(temporary, path)


def load_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of one file.

    Raises:
        InputError: no such file, or it is truncated or altered in its header.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); remove it and make it again") from error


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, through a temporary name."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
