"""The chunked suffix attention: gradients, chunk sizes, rows that see nothing, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from jax.test_util import check_grads

from flaxdraft.algorithms.eagle3.suffix_attention import Suffix, dense, merged
from flaxdraft.ops.attention import KeyRange
from flaxdraft.ops.range_attention import Chunks

pytestmark = pytest.mark.numeric

# (batch, query rows, key rows, query heads, key/value heads, q/k width, value width, suffix steps)
SHAPES = {
    "gqa": (2, 9, 13, 4, 2, 6, 6, 3),
    "mla": (2, 9, 13, 3, 3, 6, 4, 2),
    "one key head, no suffix": (1, 11, 16, 4, 1, 8, 8, 0),
}


def make(shape, dtype=jnp.float32, seed=0):
    """Arrays of one call; each query sees a range of keys, the last row of the batch none."""
    B, R, T, N, K, H, C, num_suffix = shape
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    q, k0, v0 = normal(B, R, N, H), normal(B, T, K, H), normal(B, T, K, C)
    suffix_k = tuple(normal(B, R, K, H) for _ in range(num_suffix))
    suffix_v = tuple(normal(B, R, K, C) for _ in range(num_suffix))
    last = np.sort(rng.integers(0, T, (B, R)), axis=1)
    first = np.maximum(last - rng.integers(0, 7, (B, R)), 0)
    if num_suffix:
        last[-1, -1] = -1
    return (q, k0, v0, Suffix(suffix_k, suffix_v)), KeyRange(jnp.asarray(first), jnp.asarray(last))


def loss_of(attention, seen, *rest):
    def loss(arrays):
        out = attention(*arrays, seen, 0.4, *rest)
        return jnp.sum(jnp.sin(out) * jnp.arange(out.size).reshape(out.shape) / out.size)

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("chunks", [Chunks(4, 4), Chunks(3, 8), Chunks(64, 64)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_are_the_dense_ones(shape, chunks):
    arrays, seen = make(SHAPES[shape])
    want, want_grads = loss_of(dense, seen)(arrays)
    got, got_grads = loss_of(merged, seen, chunks)(arrays)
    (_, R, _, N, K, _, C, _) = SHAPES[shape]
    # The loss adds up all outputs of both rows; a key's gradient those of the queries that may see it.
    assert_close(got, want, summands=2 * R * N * C)
    assert_close(got_grads, want_grads, summands=R * N // K)


@pytest.mark.parametrize("shape", [pytest.param("gqa", marks=pytest.mark.slow), "mla"])
def test_gradients_against_finite_differences(shape):
    with jax.enable_x64(True):
        arrays, seen = make((1, 4, 5, *SHAPES[shape][3:]), jnp.float64)
        attention = lambda *arrays: merged(*arrays, seen, 0.4, Chunks(2, 2))  # noqa: E731
        check_grads(attention, arrays, order=1, modes=["rev"], atol=1e-7, rtol=1e-7)


def test_a_row_that_sees_nothing_gives_zero_and_no_gradient():
    (q, k0, v0, _), seen = make(SHAPES["gqa"])
    arrays = q, k0, v0, Suffix()
    seen = seen._replace(last_BR=seen.last_BR.at[:].set(-1))
    value = merged(*arrays, seen, 0.4, Chunks(4, 4))
    np.testing.assert_array_equal(value, jnp.zeros_like(value))
    _, grads = loss_of(merged, seen, Chunks(4, 4))(arrays)
    for grad in jax.tree.leaves(grads):
        np.testing.assert_array_equal(grad, jnp.zeros_like(grad))


def test_bfloat16_stays_close_to_float32():
    arrays, seen = make(SHAPES["gqa"])
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays)
    want = dense(*jax.tree.map(lambda x: x.astype(jnp.float32), narrow), seen, 0.4)
    got = merged(*narrow, seen, 0.4, Chunks(4, 4))
    assert got.dtype == jnp.bfloat16
    # The dense row that sees nothing averages all keys before its own join in.
    assert_close(got, want, ulp=1)


def test_memory_is_linear_in_length():
    """XLA's own count of temporary memory, forward and backward, when the rows double."""
    sizes = []
    for num in (256, 512):
        arrays, _ = make((1, num, num, 2, 1, 8, 8, 1))
        seen = KeyRange(jnp.zeros((1, num), jnp.int32), jnp.arange(num)[None])
        compiled = loss_of(merged, seen, Chunks(32, 32)).lower(arrays).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert sizes[1] < 2.2 * sizes[0]
