"""How a frozen target's layer attends: over whole documents, over its cache, over a tree of draft tokens.

Shape letters: B batch, T time, S cache slots, N query heads, K key/value heads, H query and key width, C value width.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Float, Int

from flaxdraft.devices.per_device import on_shards
from flaxdraft.devices.sharding import Sharding
from flaxdraft.interfaces import Placement
from flaxdraft.ops import cudnn_attention, range_attention
from flaxdraft.ops.attention import KeyRange, attend, attend_cache, causal_visibility, document_ranges
from flaxdraft.targets.kv_cache import Cache

DENSE_SCORES = 2**24  # of one device, up to which several query rows have their scores built whole
CHUNKS = range_attention.Chunks(256, 256)


class QueryRows(NamedTuple):
    """What rows are, the same in every layer."""

    positions_BT: Int[Array, "B T"]
    segments_BT: Int[Array, "B T"] | None  # the documents that rows are packed of; None where there is a cache
    placement: Placement | None  # of a tree's nodes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Softmax:
    """How scores become weights; see `nn.self_attention.Attend`."""

    scale: float = dataclasses.field(metadata={"static": True})
    window: Int[Array, ""] | None = None
    sinks_N: Float[Array, " N"] | None = None


class LayerAttention:
    """An `Attend` for one layer, which attends once. Where there is a cache, the layer's keys and values are in `cache`
    afterwards."""

    def __init__(self, rows: QueryRows, cache: Cache | None, layer: Int[Array, ""], sharding: Sharding):
        self.rows, self.cache, self.layer, self.sharding = rows, cache, layer, sharding

    def __call__(
        self, q_BTNH: Float[Array, "B T N H"], k_BTKH: Float[Array, "B T K H"], v_BTKC: Float[Array, "B T K C"],
        scale: float, *, window: int | Int[Array, ""] | None = None, sinks_N: Float[Array, " N"] | None = None,
    ) -> Float[Array, "B T N C"]:  # fmt: skip
        s, rows = self.sharding, self.rows
        heads_spec, rows_spec = s.act_btnh, s.act_btd and P(*s.act_btd[:2])
        softmax = Softmax(scale, None if window is None else jnp.asarray(window, jnp.int32), sinks_N)
        softmax_spec = jax.tree.map(lambda x: s.weight_f if x.ndim else P(), softmax)
        if self.cache is None:
            specs = (heads_spec, heads_spec, heads_spec, rows_spec, softmax_spec)
            return on_shards(s, uncached, specs, heads_spec)(q_BTNH, k_BTKH, v_BTKC, rows.segments_BT, softmax)
        how, places = (cached, ()) if rows.placement is None else (placed, (rows.placement,))
        cache_spec = jax.tree.map(lambda _: s.cache_lbn, self.cache)
        specs = (
            cache_spec,
            P(),
            heads_spec,
            heads_spec,
            heads_spec,
            softmax_spec,
            rows_spec,
            *[rows_spec] * len(places),
        )
        on_device = on_shards(s, how, specs, (heads_spec, cache_spec))
        heads_BTNC, self.cache = on_device(
            self.cache, self.layer, q_BTNH, k_BTKH, v_BTKC, softmax, rows.positions_BT, *places
        )
        return heads_BTNC


def uncached(
    q_BTNH: Float[Array, "B T N H"], k_BTKH: Float[Array, "B T K H"], v_BTKC: Float[Array, "B T K C"],
    segments_BT: Int[Array, "B T"], softmax: Softmax,
) -> Float[Array, "B T N C"]:  # fmt: skip
    """Causal attention inside each document; where whole scores would be many, by cuDNN or in chunks. The rows of a
    document are at consecutive positions."""
    num_batch, num_rows, num_heads, _ = q_BTNH.shape
    scale, window = softmax.scale, softmax.window
    if num_batch * num_heads * num_rows**2 <= DENSE_SCORES:
        visible_BTT = causal_visibility(segments_BT)
        if window is not None:
            at_T = jnp.arange(num_rows)
            visible_BTT &= (at_T[None, :] > at_T[:, None] - window)[None]
        return attend(q_BTNH, k_BTKH, v_BTKC, visible_BTT, scale, softmax.sinks_N)
    seen = document_ranges(segments_BT)
    if window is None and cudnn_attention.unavailable(q_BTNH, v_BTKC) is None:
        found = cudnn_attention.forward(q_BTNH, k_BTKH, v_BTKC, seen, scale, packed=True)
        return _with_sinks(*found, softmax).astype(v_BTKC.dtype)
    return _in_chunks(q_BTNH, k_BTKH, v_BTKC, seen, softmax)


def placed(
    cache: Cache, layer: Int[Array, ""], q_BTNH: Float[Array, "B T N H"], k_BTKH: Float[Array, "B T K H"],
    v_BTKC: Float[Array, "B T K C"], softmax: Softmax, positions_BT: Int[Array, "B T"], placement: Placement,
) -> tuple[Float[Array, "B T N C"], Cache]:  # fmt: skip
    """Writes the new keys and values where they belong and attends to what each row may see."""
    cache = cache.written(layer, k_BTKH, v_BTKC, placement.slots_BT)
    k_BKHS, v_BKSC, visible_BTS = cache.k_LBKHS[layer], cache.v_LBKSC[layer], placement.visible_BTS
    if softmax.window is not None:
        # A slot holds its own position, but for those of the new rows.
        at_BS = jnp.broadcast_to(jnp.arange(cache.num_slots)[None], (len(positions_BT), cache.num_slots))
        rows_B1 = jnp.arange(len(positions_BT))[:, None]
        at_BS = at_BS.at[rows_B1, placement.slots_BT].set(positions_BT, mode="drop")
        visible_BTS &= at_BS[:, None, :] > positions_BT[:, :, None] - softmax.window
    return attend_cache(q_BTNH, k_BKHS, v_BKSC, visible_BTS, softmax.scale, softmax.sinks_N), cache


def cached(
    cache: Cache, layer: Int[Array, ""], q_BTNH: Float[Array, "B T N H"], k_BTKH: Float[Array, "B T K H"],
    v_BTKC: Float[Array, "B T K C"], softmax: Softmax, positions_BT: Int[Array, "B T"],
) -> tuple[Float[Array, "B T N C"], Cache]:  # fmt: skip
    """Writes the new keys and values and attends to all slots up to each position."""
    cache = cache.written(layer, k_BTKH, v_BTKC, positions_BT)
    num_slots, (num_batch, num_rows, num_heads, _) = cache.num_slots, q_BTNH.shape
    if num_rows > 1 and num_batch * num_heads * num_rows * num_slots > DENSE_SCORES:
        k_BSKH, v_BSKC = jnp.moveaxis(cache.k_LBKHS[layer], 3, 1), jnp.moveaxis(cache.v_LBKSC[layer], 2, 1)
        last_BT = jnp.where(positions_BT < num_slots, positions_BT, -1)  # padding sees nothing
        seen = KeyRange(jnp.zeros_like(last_BT), last_BT)
        return _in_chunks(q_BTNH, k_BSKH, v_BSKC, seen, softmax), cache
    at_S = jnp.arange(num_slots)[None, None, :]
    visible_BTS = at_S <= positions_BT[:, :, None]
    if softmax.window is not None:
        visible_BTS &= at_S > positions_BT[:, :, None] - softmax.window
    k_BKHS, v_BKSC = cache.k_LBKHS[layer], cache.v_LBKSC[layer]
    return attend_cache(q_BTNH, k_BKHS, v_BKSC, visible_BTS, softmax.scale, softmax.sinks_N), cache


def _in_chunks(q_BTNH, k_BTKH, v_BTKC, seen: KeyRange, softmax: Softmax):
    if softmax.window is not None:
        seen = KeyRange(jnp.maximum(seen.first_BR, seen.last_BR - softmax.window + 1), seen.last_BR)
    found = range_attention.forward(q_BTNH, k_BTKH, v_BTKC, seen, softmax.scale, CHUNKS)
    return _with_sinks(*found, softmax).astype(v_BTKC.dtype)


def _with_sinks(out_BTNC, logsumexp_BTN, softmax: Softmax):
    """The output of a softmax that has the sinks among its scores."""
    if softmax.sinks_N is None:
        return out_BTNC
    share_BTN = jax.nn.sigmoid(logsumexp_BTN - softmax.sinks_N.astype(logsumexp_BTN.dtype)[None, None])
    return out_BTNC * share_BTN[..., None]
