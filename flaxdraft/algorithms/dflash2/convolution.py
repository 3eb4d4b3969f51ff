"""A short convolution along a block, before and behind a part of a layer; what it multiplies by depends on the state.

    kernels = base_kernel + kernel_projection u, one for the way in and one for the way out
    in:  x_t = sum over j of kernel[in, t, j] u_(t-j);  out: y_t = sum over j of kernel[out, t, j] part(x)_(t-j)

Each channel has its own base kernel; what the projection adds is the same for all channels of a group. Slots before the
first one of a block count as 0, so nothing passes from block to block.

Shape letters: B batch, A blocks, S slots of a block, R = A S rows, J places of a kernel, D width, M = 2 J times as many
groups of channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flaxdraft.devices.per_device import per_device
from flaxdraft.devices.sharding import Sharding, spec_of
from flaxdraft.nn.layers import latent
from flaxdraft.nn.precision import Precision

WAYS = 2  # in and out


class Convolution(nnx.Module):
    """Before training it changes nothing."""

    def __init__(self, config: Any, precision: Precision, sharding: Sharding, rngs: nnx.Rngs):
        c, precision = config, dataclasses.replace(precision, float8=False)
        self.block_size = c.block_size
        identity = jnp.zeros((WAYS, c.conv_kernel_size, c.hidden_size), precision.param).at[:, 0].set(1)
        self.base_kernel = nnx.Param(identity, place="whole")
        num_out = WAYS * c.conv_kernel_size * (c.hidden_size // c.conv_group_size)
        self.kernel_projection = latent(c.hidden_size, num_out, precision, rngs, sharding)
        self.kernel_projection.kernel[...] = jnp.zeros_like(self.kernel_projection.kernel[...])

    def __call__(
        self, normed_BRD: Float[Array, "B R D"], part: Callable[[Array], Array]
    ) -> Float[Array, "B R D"]:  # fmt: skip
        """What the part gives between both convolutions.

        Args:
            normed_BRD: whole blocks.
        """
        added = self.kernel_projection(normed_BRD)
        read = self._along(0, normed_BRD, added)
        return self._along(1, part(read), added)

    def _along(self, way: int, x_BRD: Float[Array, "B R D"], added_BRM: Float[Array, "B R M"]):
        local = partial(_along_blocks, way, self.block_size)
        return per_device(local, spec_of(x_BRD), x_BRD, added_BRM, self.base_kernel[...])


def _along_blocks(way: int, size: int, x_BRD, added_BRM, base_2JD):
    num_batch, _, width = x_BRD.shape
    wide = jnp.promote_types(x_BRD.dtype, jnp.float32)
    x_BASD = x_BRD.astype(wide).reshape(num_batch, -1, size, width)
    added = added_BRM.astype(wide).reshape(*x_BASD.shape[:3], WAYS, base_2JD.shape[1], -1)[:, :, :, way]
    out_BASD = jnp.zeros_like(x_BASD)
    for j in range(base_2JD.shape[1]):
        before_BASD = jnp.pad(x_BASD, ((0, 0), (0, 0), (j, 0), (0, 0)))[:, :, :size]
        of_group_BASD = jnp.repeat(added[:, :, :, j], width // added.shape[-1], axis=-1)
        out_BASD = out_BASD + (base_2JD[way, j].astype(wide)[None, None, None] + of_group_BASD) * before_BASD
    return out_BASD.reshape(x_BRD.shape).astype(x_BRD.dtype)
