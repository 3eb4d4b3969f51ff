"""How a frozen target's layer attends: over whole documents, over its cache, over a tree of draft tokens.

Shape letters: B batch, T time, S cache slots, N query heads, K key/value heads, H query and key width, C value width.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flaxdraft.interfaces import Placement
from flaxdraft.ops import cudnn_attention, range_attention
from flaxdraft.ops.attention import attend, attend_cache, causal_visibility, document_ranges
from flaxdraft.targets.kv_cache import Cache

DENSE_SCORES = 2**24  # of one device, up to which several query rows have their scores built whole
CHUNKS = range_attention.Chunks(256, 256)


def uncached(
    q_BTNH: Float[Array, "B T N H"], k_BTKH: Float[Array, "B T K H"], v_BTKC: Float[Array, "B T K C"],
    segments_BT: Int[Array, "B T"], scale: float,
) -> Float[Array, "B T N C"]:  # fmt: skip
    """Causal attention inside each document; where whole scores would be many, by cuDNN or in chunks."""
    num_batch, num_rows, num_heads, _ = q_BTNH.shape
    if num_batch * num_heads * num_rows**2 <= DENSE_SCORES:
        return attend(q_BTNH, k_BTKH, v_BTKC, causal_visibility(segments_BT), scale)
    if cudnn_attention.unavailable(q_BTNH, v_BTKC) is None:
        out, _ = cudnn_attention.forward(q_BTNH, k_BTKH, v_BTKC, *document_ranges(segments_BT), scale, packed=True)
        return out.astype(v_BTKC.dtype)
    return _in_chunks(q_BTNH, k_BTKH, v_BTKC, *document_ranges(segments_BT), scale)


def placed(
    cache: Cache, layer: Int[Array, ""], q_BTNH: Float[Array, "B T N H"], k_BTKH: Float[Array, "B T K H"],
    v_BTKC: Float[Array, "B T K C"], placement: Placement, scale: float,
) -> tuple[Float[Array, "B T N C"], Cache]:  # fmt: skip
    """Writes the new keys and values where they belong and attends to what each row may see."""
    cache = cache.written(layer, k_BTKH, v_BTKC, placement.slots_BT)
    k_BKHS, v_BKSC = cache.k_LBKHS[layer], cache.v_LBKSC[layer]
    return attend_cache(q_BTNH, k_BKHS, v_BKSC, placement.visible_BTS, scale), cache


def cached(
    cache: Cache, layer: Int[Array, ""], q_BTNH: Float[Array, "B T N H"], k_BTKH: Float[Array, "B T K H"],
    v_BTKC: Float[Array, "B T K C"], positions_BT: Int[Array, "B T"], scale: float,
) -> tuple[Float[Array, "B T N C"], Cache]:  # fmt: skip
    """Writes the new keys and values and attends to all slots up to each position."""
    cache = cache.written(layer, k_BTKH, v_BTKC, positions_BT)
    num_slots, (num_batch, num_rows, num_heads, _) = cache.num_slots, q_BTNH.shape
    if num_rows > 1 and num_batch * num_heads * num_rows * num_slots > DENSE_SCORES:
        k_BSKH, v_BSKC = jnp.moveaxis(cache.k_LBKHS[layer], 3, 1), jnp.moveaxis(cache.v_LBKSC[layer], 2, 1)
        last_BT = jnp.where(positions_BT < num_slots, positions_BT, -1)  # padding sees nothing
        return _in_chunks(q_BTNH, k_BSKH, v_BSKC, jnp.zeros_like(last_BT), last_BT, scale), cache
    visible = jnp.arange(num_slots)[None, None, :] <= positions_BT[:, :, None]
    return attend_cache(q_BTNH, cache.k_LBKHS[layer], cache.v_LBKSC[layer], visible, scale), cache


def _in_chunks(q_BTNH, k_BTKH, v_BTKC, first_BT, last_BT, scale: float):
    out, _ = range_attention.forward(q_BTNH, k_BTKH, v_BTKC, first_BT, last_BT, scale, CHUNKS)
    return out.astype(v_BTKC.dtype)
