"""`range_attention` by cuDNN's fused kernels: NVIDIA GPUs, bfloat16 or float16.

The kernels know one causal mask over rows that begin together, so queries are laid out at the key rows where they sit
(the last row that each one sees); rows without a query get nothing and give nothing. Documents packed into one row are
told apart by extra query and key columns: the bits of a document's number, with a product of -PENALTY wherever a bit is
set in the query's number and not in the key's. For every earlier document some bit is, so its keys vanish; inside one
document every extra product is exactly 0. Whether rows are packed is known when the program is made: asking the data
would make the host wait for the device at every call.

JAX reaches the kernels under private names only: the public function rounds the logsumexp to the inputs' precision and
drops its gradient, and offers no backward pass that is fed with a merged output. `moved` says whether this JAX still
has the names; nothing else of the package touches a private module.

Shape letters: B batch, R query rows, T key rows, N query heads, K key/value heads, H query/key width, C value width.
"""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxdraft.ops.attention import MASKED, KeyRange
from flaxdraft.ops.range_attention import Joint

try:
    from jax._src.cudnn import fused_attention_stablehlo as _fused
except ImportError:
    _fused = None

Shaped: TypeAlias = jax.Array | jax.ShapeDtypeStruct  # whose shape and type suffice
MAX_WIDTH = 256  # of queries and keys, on Hopper and later
# Far above any logsumexp: exp(score - ABSENT) is 0 for a row that holds no query.
ABSENT = 1e10
_SETTINGS = {"seed": 42, "dropout_rate": 0.0, "variadic_args": (False, False), "sliding_window_length": None,
             "score_mod": None}  # fmt: skip


@functools.cache
def moved() -> str | None:
    """What this JAX lacks of the private names used here; None where all are in place."""
    wanted = (
        ("_dot_product_attention_fwd_p_wrapper", "_dot_product_attention_fwd_impl"),
        ("_dot_product_attention_bwd_p_wrapper", "_dot_product_attention_bwd_impl"),
    )
    known = {*_SETTINGS, "scale", "mask_type", "layout", "is_training", "score_mod_args"}
    known |= {"activation", "fwd_output", "grad_output"}
    for names in (*wanted, ("MaskType", "AttentionLayout")):
        for name in names:
            if not hasattr(_fused, name):
                return f"jax {jax.__version__} has no {name} among its cuDNN functions"
    for _, implementation in wanted:
        parameters = list(inspect.signature(getattr(_fused, implementation)).parameters)
        if new := set(parameters[parameters.index("page_table_v") + 1 :]) - known:
            return f"jax {jax.__version__} gives its cuDNN functions settings unknown here: {', '.join(sorted(new))}"
    return None


def unavailable(q_BRNH: Shaped, v_BTKC: Shaped) -> str | None:
    """Why these arrays cannot be attended to by cuDNN on this machine; None where they can."""
    if jax.default_backend() != "gpu" or "cuda" not in jax.devices()[0].client.platform_version.lower():
        return f"it needs an NVIDIA GPU, found {jax.default_backend()}"
    if moved():
        return moved()
    if q_BRNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, found {q_BRNH.dtype} (train.compute_dtype)"
    capability = float(jax.devices()[0].compute_capability)
    width, value_width = q_BRNH.shape[-1] + _code_width(q_BRNH.shape[1]), v_BTKC.shape[-1]
    if capability < 9.0:
        return f"it needs compute capability 9.0 (Hopper) or later, found {capability}"
    if width > MAX_WIDTH or value_width > MAX_WIDTH or q_BRNH.shape[-1] % 8 or value_width % 8:
        return (
            f"it needs head widths that are multiples of 8 and at most {MAX_WIDTH}, document columns included; found "
            f"{q_BRNH.shape[-1]} ({width} with them) and {value_width}"
        )
    return None


class _Layout(NamedTuple):
    """Where queries sit among the key rows."""

    at_BR: jax.Array  # the key row of each query, T where it sees nothing
    query_BT: jax.Array  # the query of each key row, R where there is none
    document_BT: jax.Array  # numbers the documents that hold queries, in their order
    length_B: jax.Array  # rows up to the last query


def _layout(seen: KeyRange, num_keys: int) -> _Layout:
    first_BR, last_BR = seen
    sees_BR = first_BR <= last_BR
    at_BR = jnp.where(sees_BR, last_BR, num_keys)
    queries_R = jnp.arange(first_BR.shape[1], dtype=jnp.int32)
    absent_T = jnp.full(num_keys, first_BR.shape[1], jnp.int32)
    query_BT = jax.vmap(lambda at: absent_T.at[at].set(queries_R, mode="drop"))(at_BR)
    begin_BR = jnp.where(sees_BR, first_BR, num_keys)
    begins_BT = jax.vmap(lambda at: jnp.zeros(num_keys, jnp.int32).at[at].max(1, mode="drop"))(begin_BR)
    # The kernels may not be told of an empty row.
    length_B = jnp.maximum(jnp.max(jnp.where(sees_BR, last_BR, 0), axis=1) + 1, 1)
    return _Layout(at_BR, query_BT, jnp.cumsum(begins_BT, axis=1), length_B.astype(jnp.int32))


def _take(x: jax.Array, at: jax.Array, fill: float = 0.0) -> jax.Array:
    """Rows of axis 1; indices past the end give `fill`."""
    return jax.vmap(lambda row, index: row.at[index].get(mode="fill", fill_value=fill))(x, at)


def _code_width(num_queries: int) -> int:
    """Columns that number as many documents as there are queries, a multiple of 8."""
    return -(-num_queries.bit_length() // 8) * 8


def _with_codes(q_BTNH, k_BTKH, document_BT, num_queries: int, scale: float):
    """Queries and keys widened by the bits of their documents' numbers."""
    penalty = 2.0 ** math.ceil(math.log2(1000.0 / scale))  # a power of two: exact in the narrow types
    bits_BT1C = (document_BT[:, :, None, None] >> jnp.arange(_code_width(num_queries))[None, None, None]) & 1

    def widen(x, bits):
        bits = jnp.broadcast_to(bits, (*x.shape[:3], bits.shape[-1])).astype(x.dtype)
        return jnp.concatenate([x, bits], axis=-1)

    return widen(q_BTNH, -penalty * bits_BT1C), widen(k_BTKH, 1.0 - bits_BT1C)


def _call(direction: str, arrays: tuple, extra: tuple, length_B, scale: float, **settings: Any) -> list[jax.Array]:
    """One kernel. Arrays are [B, T, heads, width], the logsumexp among `extra` is [B, N, T]."""
    assert _fused is not None, "see `moved`"
    primitive = getattr(_fused, f"_dot_product_attention_{direction}_p_wrapper")
    implementation = getattr(_fused, f"_dot_product_attention_{direction}_impl")
    unused = jnp.zeros(0, arrays[0].dtype)
    names = inspect.signature(implementation).parameters
    chosen = {name: value for name, value in _SETTINGS.items() if name in names}
    return primitive.bind(
        *arrays, unused, length_B, length_B, unused, unused, unused, unused, *extra, scale=scale,
        mask_type=_fused.MaskType.PADDING_CAUSAL, layout=_fused.AttentionLayout.BTNH.value, **chosen, **settings,
    )  # fmt: skip


def forward(
    q_BRNH: Float[Array, "B R N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKC: Float[Array, "B T K C"],
    seen: KeyRange,
    scale: float,
    packed: bool,
) -> tuple[Float[Array, "B R N C"], Float[Array, "B R N"]]:
    """See `range_attention.forward`; here no two queries of a row may share their last key.

    Args:
        packed: whether a row may hold several documents. False makes every query see its row from the beginning.
    """
    layout = _layout(seen, k_BTKH.shape[1])
    q_BTNH = _take(q_BRNH, layout.query_BT)
    if packed:
        q_BTNH, k_BTKH = _with_codes(q_BTNH, k_BTKH, layout.document_BT, q_BRNH.shape[1], scale)
    out_BTNC, logsumexp_BNT = _call("fwd", (q_BTNH, k_BTKH, v_BTKC), (), layout.length_B, scale, is_training=True)
    sees = (seen.first_BR <= seen.last_BR)[:, :, None]
    # What the kernels leave in rows past the last query is not defined.
    out_BRNC = jnp.where(sees[..., None], _take(out_BTNC, layout.at_BR).astype(jnp.float32), 0.0)
    return out_BRNC, jnp.where(sees, _take(jnp.moveaxis(logsumexp_BNT, 1, 2), layout.at_BR), MASKED)


def backward(
    q_BRNH: Float[Array, "B R N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKC: Float[Array, "B T K C"],
    seen: KeyRange,
    joint: Joint,
    grad_BRNC: Float[Array, "B R N C"],
    scale: float,
    packed: bool,
) -> tuple[Float[Array, "B R N H"], Float[Array, "B T K H"], Float[Array, "B T K C"]]:
    """See `range_attention.backward`."""
    layout = _layout(seen, k_BTKH.shape[1])
    logsumexp_BNT = jnp.moveaxis(_take(joint.logsumexp_BRN, layout.query_BT, ABSENT), 2, 1)
    out_BTNC, grad_BTNC = _take(joint.out_BRNC, layout.query_BT), _take(grad_BRNC, layout.query_BT)
    q_BTNH, num_keys, width = _take(q_BRNH, layout.query_BT), k_BTKH.shape[1], q_BRNH.shape[-1]
    if packed:
        q_BTNH, k_BTKH = _with_codes(q_BTNH, k_BTKH, layout.document_BT, q_BRNH.shape[1], scale)
    extra = logsumexp_BNT, out_BTNC, grad_BTNC
    dq, dk, dv = _call("bwd", (q_BTNH, k_BTKH, v_BTKC), extra, layout.length_B, scale)
    dq, dk = dq[..., :width], dk[..., :width]
    inside = (jnp.arange(num_keys)[None] < layout.length_B[:, None])[:, :, None, None]
    dk, dv = (jnp.where(inside, x.astype(jnp.float32), 0.0) for x in (dk, dv))
    sees = (seen.first_BR <= seen.last_BR)[:, :, None, None]
    return jnp.where(sees, _take(dq, layout.at_BR).astype(jnp.float32), 0.0), dk, dv
