"""What a run has been through, counted on the device and kept in its checkpoints: no step waits for a number."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

_BASE = 2**30  # of the two digits in which tokens are counted: there is no 64-bit integer without jax_enable_x64

Counters = dict[str, Array]


def zero(mesh: jax.sharding.Mesh) -> Counters:
    return jax.device_put({"tokens": np.zeros(2, np.int32)}, jax.NamedSharding(mesh, jax.P()))


@jax.jit
def advanced(counters: Counters, segments_BT: Int[Array, "B T"]) -> Counters:
    """After one more batch; padding (segment 0) is no token."""
    low = counters["tokens"][0] + jnp.sum(segments_BT > 0)
    return {"tokens": jnp.stack([low % _BASE, counters["tokens"][1] + low // _BASE])}


def tokens(counters: Counters) -> int:
    """The number of tokens, of counters that were read."""
    low, high = counters["tokens"]
    return int(low) + int(high) * _BASE
