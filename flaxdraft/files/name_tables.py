"""Weights across the border between other projects' names and shapes and ours: declarative name tables.

A table row is (JAX path, PyTorch key template, transform). A `{i}` in the template stacks layers on axis 0, an `{e}`
experts on the next. Transforms invert bitwise. Reading accounts for every tensor: one that is missing, left over or
misshapen is an error that names it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from flaxdraft.errors import InputError
from flaxdraft.files.leaves import Leaf, TensorSource, Transform
from flaxdraft.files.streaming import Places, stream

NameTable = Sequence[tuple[str, str, Transform]]


def _path(name: str) -> tuple[str, ...]:
    return tuple(name.split("/"))


def _keys(template: str, layers: Sequence[int], num_experts: int) -> np.ndarray:
    """The names that a template stands for, of str, one axis for each stacked one."""
    keys = np.array(template, object)
    if "{i}" in template:
        keys = np.array([template.replace("{i}", str(i)) for i in layers], object)
    if "{e}" in template:
        keys = np.array([[key.replace("{e}", str(e)) for e in range(num_experts)] for key in keys], object)
    return keys


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Tensors that are in memory."""

    tensors: Mapping[str, np.ndarray]
    origin: str

    def names(self) -> Iterable[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self.tensors[name][index]


def load_state(
    abstract: nnx.State,
    table: NameTable,
    source: TensorSource,
    groups: Mapping[str, Sequence[int]],
    num_experts: int = 0,
    places: Places | None = None,
    ignored: Callable[[str], bool] = lambda name: False,
    title: str | None = None,
) -> nnx.State:
    """Fills an abstract NNX state from PyTorch-named tensors, each device's part straight into its place.

    What is held beside the arrays, on the host and on the devices, is bounded: see `streaming`.

    Args:
        abstract: shapes and dtypes (nnx.eval_shape); every leaf must be covered by the table.
        groups: the layers' numbers in the file for each group; a group is the first component of a JAX path.
        places: where each leaf lives; where None, on the default device, free to be moved by what uses it.
        ignored: names that the source may hold and nobody needs.
        title: of a bar that shows how far it is; None shows none.

    Raises:
        InputError: missing, unexpected or misshapen tensors, all of them listed.
    """
    slots = {path: variable for path, variable in nnx.to_flat_state(abstract)}
    leaves = [_leaf(row, slots, groups, num_experts) for row in table]
    _check(leaves, source, ignored)
    filled = stream(leaves, source, places, title)
    return nnx.from_flat_state([(path, slots[path].replace(filled[path])) for path in slots])


def _leaf(row, slots, groups, num_experts: int) -> Leaf:
    """The array of a row and what it is made of."""
    jax_path, template, transform = row
    path = _path(jax_path)
    keys = _keys(template, groups.get(path[0], ()), num_experts)
    return Leaf(path, keys, tuple(slots[path].shape), np.dtype(slots[path].dtype), transform)


def _check(leaves: Sequence[Leaf], source: TensorSource, ignored: Callable[[str], bool]) -> None:
    names, used, missing, misshapen = set(source.names()), set(), [], []
    for leaf in leaves:
        for key in leaf.keys.ravel():
            used.add(key)
            if key not in names:
                missing.append(key)
            elif (found := tuple(source.shape(key))) != leaf.tensor_shape:
                misshapen.append(f"{key}: found {found}, expected {leaf.tensor_shape}")
    extra = sorted(name for name in names - used if not ignored(name))
    problems = [f"missing: {_few(missing, ', ')}"] if missing else []
    problems += [f"unexpected: {_few(extra, ', ')}"] if extra else []
    problems += [f"wrong shape: {_few(misshapen, '; ')}"] if misshapen else []
    if problems:
        raise InputError(f"{source.origin}: the weights do not fit the configuration. " + " | ".join(problems))


def _few(items: Sequence[str], between: str) -> str:
    more = f" and {len(items) - 8} more" if len(items) > 8 else ""
    return between.join(items[:8]) + more


def state_from_torch(
    abstract: nnx.State, table: NameTable, tensors: Mapping[str, np.ndarray], origin: str, num_layers: int = 1
) -> nnx.State:
    """`load_state` from tensors in memory, on one device; the stacked group, if there is one, is called layers."""
    return load_state(abstract, table, ArraySource(tensors, origin), {"layers": range(num_layers)})


def state_to_torch(
    state: nnx.State, table: NameTable, dtype: Any, groups: Mapping[str, Sequence[int]] | None = None
) -> dict[str, np.ndarray]:
    """The inverse: PyTorch key -> array of `dtype`.

    Args:
        groups: see `load_state`; where a group is not named, its layers count from 0.
    """
    flat, groups, out = dict(nnx.to_flat_state(state)), groups or {}, {}
    for jax_path, template, transform in table:
        path = _path(jax_path)
        with np.errstate(over="ignore"):  # the caller looks for what overflowed
            array = np.asarray(jax.device_get(flat[path][...])).astype(dtype)
        layers = groups.get(path[0], range(array.shape[0])) if "{i}" in template else ()
        keys = _keys(template, layers, array.shape[1] if "{e}" in template else 0)
        for at in np.ndindex(keys.shape):
            out[str(keys[at])] = np.ascontiguousarray(array[at].T if transform == "transpose" else array[at])
    return out
