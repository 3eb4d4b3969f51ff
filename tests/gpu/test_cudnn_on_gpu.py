"""cuDNN's suffix attention against the dense one: values and gradients, on the GPU.

pytest -m gpu
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close

from flaxdraft.algorithms.eagle3.suffix_attention import Suffix, Way, dense, suffix_attention
from flaxdraft.devices.mesh import make_mesh
from flaxdraft.ops.attention import KeyRange
from flaxdraft.targets import target_attention

pytestmark = pytest.mark.gpu

# (key rows, query heads, key/value heads, q/k width, value width)
SHAPES = {
    "gqa": (256, 8, 2, 128, 128),
    "narrow gqa": (256, 4, 4, 64, 64),
    "mla": (256, 4, 4, 192, 128),
    "odd length": (250, 8, 2, 128, 128),
}
# Where the documents of a row begin.
DOCUMENTS = {"one document": [0], "packed": [0, 40, 41, 150, 203], "padding before": [7, 90]}


def make(shape, starts, seed=0):
    """bfloat16 arrays, a share of the rows as queries, some places of the query axis empty."""
    num_keys, heads, kv_heads, width, value_width = shape
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    document = np.searchsorted(starts, np.arange(num_keys), side="right") - 1
    batch, first, last = 3, [], []
    for b in range(batch):
        end = num_keys - 30 * b
        rows = np.sort(rng.permutation(np.arange(starts[0], end))[: end // 2])
        pad = num_keys // 2 - len(rows)
        last.append(np.concatenate([rows, np.full(pad, -1)]))
        first.append(np.concatenate([np.asarray(starts)[document[rows]], np.zeros(pad, int)]))
    first, last = (jnp.asarray(np.stack(x), jnp.int32) for x in (first, last))
    queries = first.shape[1]
    arrays = (
        normal(batch, queries, heads, width), normal(batch, num_keys, kv_heads, width),
        normal(batch, num_keys, kv_heads, value_width),
        Suffix(
            tuple(normal(batch, queries, kv_heads, width) for _ in range(2)),
            tuple(normal(batch, queries, kv_heads, value_width) for _ in range(2)),
        ),
    )  # fmt: skip
    return arrays, KeyRange(first, last)


def loss(attention, arrays, seen, like):
    out = attention(*arrays, seen, arrays[0].shape[-1] ** -0.5).astype(jnp.float32)
    sees = (seen.first_BR <= seen.last_BR)[:, :, None, None]  # the dense one averages all keys for a row that sees none
    return jnp.sum(jnp.where(sees, out * like, 0.0)), jnp.where(sees, out, 0.0)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_are_the_dense_ones(shape, documents):
    arrays, seen = make(SHAPES[shape], DOCUMENTS[documents])
    like = jax.random.normal(jax.random.key(0), (*arrays[0].shape[:3], arrays[2].shape[-1]))
    packed = documents != "one document"
    fast = lambda *x: suffix_attention(*x, Way("cudnn", packed=packed))  # noqa: E731
    run = lambda attention, arrays: jax.jit(  # noqa: E731
        jax.value_and_grad(lambda a: loss(attention, a, seen, like), has_aux=True)
    )(arrays)
    (_, out), grads = run(fast, arrays)
    with jax.default_matmul_precision("highest"):
        (_, want), wanted = run(dense, jax.tree.map(lambda x: x.astype(jnp.float32), arrays))
    for a, b in zip(jax.tree.leaves((out, grads)), jax.tree.leaves((want, wanted)), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.isfinite(a).all()
        assert_close(a, b, rtol=6e-3, of="norm")  # bfloat16 keeps 8 bits


def test_arrays_split_over_a_mesh():
    """As the trainer has them; one device is enough for the types."""
    arrays, seen = make(SHAPES["gqa"], DOCUMENTS["packed"])
    fast = lambda *x: suffix_attention(*x, Way("cudnn"))  # noqa: E731
    like = jax.random.normal(jax.random.key(0), (*arrays[0].shape[:3], arrays[2].shape[-1]))
    grad = jax.jit(jax.grad(lambda a, *x: loss(fast, a, *x)[0]))
    want = grad(arrays, seen, like)
    mesh = make_mesh(1)
    with jax.set_mesh(mesh):
        placed = jax.device_put((arrays, seen, like), jax.NamedSharding(mesh, jax.P("data")))
        got = grad(*placed)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("shape", ["narrow gqa", "gqa"])
def test_a_target_reads_packed_rows_with_it(shape, monkeypatch):
    num_keys, heads, kv_heads, width, value_width = SHAPES[shape]
    rng = np.random.default_rng(0)
    normal = lambda heads, width: jnp.asarray(rng.normal(size=(2, num_keys, heads, width)), jnp.bfloat16)  # noqa: E731
    arrays = normal(heads, width), normal(kv_heads, width), normal(kv_heads, value_width)
    segments = np.searchsorted([0, 40, 41, 150, 203], np.arange(num_keys), side="right")
    segments = jnp.asarray(np.stack([segments, np.where(np.arange(num_keys) < 230, segments, 0)]), jnp.int32)
    softmax = target_attention.Softmax(width**-0.5)
    attention = lambda *x: jax.jit(lambda *x: target_attention.uncached(*x, segments, softmax))(*x)  # noqa: E731
    with jax.default_matmul_precision("highest"):
        want = attention(*(x.astype(jnp.float32) for x in arrays))
    monkeypatch.setattr(target_attention, "DENSE_SCORES", 0)
    got, want = (np.asarray(x[segments > 0], np.float32) for x in (attention(*arrays), want))
    assert_close(got, want, rtol=6e-3, of="norm")
