"""A recurrent state that goes along each block.

Shape letters: B batch, R = A S rows of blocks of S slots, G width of the state, F of the gates, E of what is given.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from flaxdraft.devices.per_device import per_device
from flaxdraft.devices.sharding import spec_of

# (kernel, state [..., G], a slot's gates [..., F]) -> the state after the slot, and what is given there [..., E]
Cell = Callable[[Array, Array, Array], tuple[Array, Array]]


def along_blocks(
    cell: Cell, size: int, gates_BRF: Float[Array, "B R F"], kernel_GF: Float[Array, "G F"]
) -> Float[Array, "B R E"]:
    """What a cell gives at every slot; its state, at least float32, begins as 0 in each block of `size`.

    Args:
        gates_BRF: what is made of each slot without the state.
        kernel_GF: whole on every device.
    """
    return per_device(partial(_walk, cell, size), spec_of(gates_BRF), gates_BRF, kernel_GF)


def _walk(cell: Cell, size: int, gates_BRF, kernel_GF):
    gates = gates_BRF.reshape(gates_BRF.shape[0], -1, size, gates_BRF.shape[2])
    start = jnp.zeros((*gates.shape[:2], kernel_GF.shape[0]), jnp.promote_types(gates.dtype, jnp.float32))

    def step(state, gates):
        state, given = cell(kernel_GF, state, gates)
        return state, given.astype(gates.dtype)

    _, given = lax.scan(step, start, jnp.moveaxis(gates, 2, 0))
    return jnp.moveaxis(given, 0, 2).reshape(*gates_BRF.shape[:2], -1)
