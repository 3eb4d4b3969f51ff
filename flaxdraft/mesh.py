"""The device mesh and where each array lives on it."""

from __future__ import annotations

import dataclasses

import jax
from jax import P

from flaxdraft.errors import InputError

BATCH_AXIS = "data"


@dataclasses.dataclass(frozen=True)
class Sharding:
    """Where each logical array lives; the field suffix names its dims. `None` leaves the choice to JAX."""

    weight: P | None = None
    act_b: P | None = None
    act_btd: P | None = None
    act_btnh: P | None = None

    @classmethod
    def none(cls) -> Sharding:
        """One device, no mesh."""
        return cls()

    @classmethod
    def data_parallel(cls, axis: str = BATCH_AXIS) -> Sharding:
        """Weights replicated, rows of the batch split over one axis."""
        return cls(P(), P(axis), P(axis, None, None), P(axis, None, None, None))


def make_mesh(data: int) -> jax.sharding.Mesh:
    """A mesh of explicit axes over the first `data` devices.

    Raises:
        InputError: fewer devices are visible.
    """
    if data > jax.device_count():
        raise InputError(
            f"mesh.data: {data} devices were asked for, {jax.device_count()} are visible ({jax.default_backend()})"
        )
    return jax.make_mesh((data,), (BATCH_AXIS,), devices=jax.devices()[:data])
