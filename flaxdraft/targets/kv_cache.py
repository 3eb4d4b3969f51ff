"""The KV cache of a target: all its layers in two arrays, updated in place where the program owns them.

Shape letters: L layers, B batch, F rows of a smaller batch, T new rows, S slots, K key/value heads, H key width,
C value width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Slot s of a row holds the keys and values of its position s; what lies beyond the row's end is never seen."""

    k_LBKHS: Float[Array, "L B K H S"]
    v_LBKSC: Float[Array, "L B K S C"]

    @property
    def num_slots(self) -> int:
        return self.k_LBKHS.shape[-1]

    def written(
        self, layer: Int[Array, ""], k_BTKH: Float[Array, "B T K H"], v_BTKC: Float[Array, "B T K C"],
        slots_BT: Int[Array, "B T"],
    ) -> Cache:  # fmt: skip
        """With new keys and values of one layer. Slots out of range mark padding: their writes are dropped."""
        rows_B1 = jnp.arange(k_BTKH.shape[0])[:, None]
        return Cache(
            self.k_LBKHS.at[layer, rows_B1, :, :, slots_BT].set(k_BTKH, mode="drop"),
            self.v_LBKSC.at[layer, rows_B1, :, slots_BT].set(v_BTKC, mode="drop"),
        )

    def moved(self, from_BT: Int[Array, "B T"], to_BT: Int[Array, "B T"]) -> Cache:
        """What lay in slots `from_BT` of every layer put into `to_BT`, all at once; a `to_BT` out of range drops it."""
        rows_B1 = jnp.arange(from_BT.shape[0])[:, None]
        k, v = self.k_LBKHS, self.v_LBKSC
        return Cache(
            k.at[:, rows_B1, :, :, to_BT].set(k[:, rows_B1, :, :, from_BT], mode="drop"),
            v.at[:, rows_B1, :, to_BT].set(v[:, rows_B1, :, from_BT], mode="drop"),
        )

    def with_rows(self, layer: Int[Array, ""], rows_F: Int[Array, " F"], k_FKHS: Float[Array, "F K H S"],
                  v_FKSC: Float[Array, "F K S C"]) -> Cache:  # fmt: skip
        """With one layer's keys and values, of as many slots or fewer, in rows `rows_F`; those that are no row's number
        are dropped."""
        rows_F = jnp.where(rows_F < 0, self.k_LBKHS.shape[1], rows_F)  # a negative one would count from the end
        slots = slice(0, k_FKHS.shape[-1])
        return Cache(
            self.k_LBKHS.at[layer, rows_F, :, :, slots].set(k_FKHS, mode="drop"),
            self.v_LBKSC.at[layer, rows_F, :, slots].set(v_FKSC, mode="drop"),
        )
