"""The device mesh.

Axes: data, fsdp (both split the batch; fsdp also keeps weights in pieces), sequence (splits the rows of a batch row),
tensor (heads, feed-forward, vocabulary), expert (of targets). Neighbours along the last axes are neighbouring devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax import P

from flaxdraft.errors import InputError

BATCH_AXIS, FSDP_AXIS, SEQUENCE_AXIS, EXPERT_AXIS, TENSOR_AXIS = AXES = "data", "fsdp", "sequence", "expert", "tensor"


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, expert: int = 1, sequence: int = 1,
    devices: Sequence[Any] | None = None,
) -> jax.sharding.Mesh:  # fmt: skip
    """A mesh of explicit axes over the first data x fsdp x tensor x expert x sequence devices.

    Args:
        devices: those to take from; None takes the visible ones.

    Raises:
        InputError: there are fewer devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = (data, fsdp, sequence, expert, tensor)
    wanted = math.prod(shape)
    if wanted > len(devices):
        sizes = ", ".join(f"mesh.{name}: {size}" for name, size in zip(AXES, shape, strict=True) if size > 1)
        raise InputError(f"{sizes} devices were asked for, {len(devices)} are visible ({devices[0].platform})")
    return jax.make_mesh(shape, AXES, devices=devices[:wanted])


def check_divides(name: str, shape: Iterable[int], spec: P, mesh_shape: Any) -> None:
    """
    Raises:
        InputError: an axis of the mesh does not divide its dimension of the named array.
    """
    for size, axis in zip(shape, spec, strict=False):
        if axis is not None and size % mesh_shape[axis]:
            raise InputError(
                f"mesh.{axis}: {mesh_shape[axis]} devices do not divide {name} {tuple(shape)}; expected a divisor of "
                f"{size}"
            )
