"""Suffix attention and cached attention against brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close

from flaxdraft.algorithms.eagle3.suffix_attention import Suffix, Way, suffix_attention
from flaxdraft.ops.attention import KeyRange, attend, attend_cache, causal_visibility
from flaxdraft.ops.padding import even_part
from flaxdraft.ops.range_attention import Chunks

pytestmark = pytest.mark.numeric

B, T, N, K, H, C = 2, 7, 4, 2, 6, 5


@pytest.mark.parametrize(("total", "most", "size"), [(896, 512, 448), (384, 512, 384), (1, 5, 1), (1025, 512, 342)])
def test_parts_are_even(total, most, size):
    assert even_part(total, most) == size


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), jnp.float32)


def brute_force(q, k0, v0, suffix_k, suffix_v, visible, scale):
    """One query at a time, over the explicit list of its keys."""
    q, k0, v0, visible = (np.asarray(x) for x in (q, k0, v0, visible))
    suffix_k, suffix_v = [np.asarray(k) for k in suffix_k], [np.asarray(v) for v in suffix_v]
    out = np.zeros((*q.shape[:3], v0.shape[-1]))
    for b, t, n in np.ndindex(*q.shape[:3]):
        kv = n // (q.shape[2] // k0.shape[2])
        keys = [k0[b, s, kv] for s in range(k0.shape[1]) if visible[b, t, s]] + [k[b, t, kv] for k in suffix_k]
        values = [v0[b, s, kv] for s in range(k0.shape[1]) if visible[b, t, s]] + [v[b, t, kv] for v in suffix_v]
        scores = np.array([np.dot(q[b, t, n].astype(np.float64), k) for k in keys]) * scale
        weights = np.exp(scores - scores.max())
        out[b, t, n] = (weights[:, None] / weights.sum() * np.array(values)).sum(0)
    return out


@pytest.mark.parametrize("num_suffix", [0, 1, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_suffix_attention_is_one_softmax_over_its_keys(num_suffix, kv_heads):
    seen = KeyRange(jnp.asarray([[0, 0, 0, 3, 3, 3, 3], [0] * 7]), jnp.tile(jnp.arange(T), (B, 1)))
    visible = causal_visibility(jnp.asarray([[1, 1, 1, 2, 2, 2, 2], [1] * 7]))
    q, k0, v0 = normal(B, T, N, H), normal(B, T, kv_heads, H, seed=1), normal(B, T, kv_heads, C, seed=2)
    suffix = Suffix(
        tuple(normal(B, T, kv_heads, H, seed=3 + i) for i in range(num_suffix)),
        tuple(normal(B, T, kv_heads, C, seed=9 + i) for i in range(num_suffix)),
    )
    want = brute_force(q, k0, v0, *suffix, visible, 0.7)
    for backend in ("dense", "chunked"):
        got = suffix_attention(q, k0, v0, suffix, seen, 0.7, Way(backend, Chunks(4, 2)))
        assert_close(got, want, ulp=9, path=backend)


@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_step_zero_is_plain_causal_attention(backend):
    q, k, v = normal(B, T, N, H), normal(B, T, K, H, seed=1), normal(B, T, K, H, seed=2)
    seen = KeyRange(jnp.zeros((B, T), jnp.int32), jnp.tile(jnp.arange(T), (B, 1)))
    got = suffix_attention(q, k, v, Suffix(), seen, H**-0.5, Way(backend, Chunks(3, 4)))
    assert_close(got, jax.nn.dot_product_attention(q, k, v, is_causal=True), ulp=5)


@pytest.mark.parametrize(("num_new", "machine"), [(1, "cpu"), (1, "gpu"), (3, "cpu")])
def test_cached_attention_equals_plain(num_new, machine, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: machine)  # decides how the scores of one query are written
    q, k, v = normal(B, num_new, N, H), normal(B, T, K, H, seed=1), normal(B, T, K, C, seed=2)
    visible = jnp.arange(T)[None, None, :] <= jnp.asarray([[3, 4, 5], [1, 2, 6]])[:, :num_new, None]
    got = attend_cache(q, jnp.transpose(k, (0, 2, 3, 1)), jnp.swapaxes(v, 1, 2), visible, 0.3)
    assert_close(got, attend(q, k, v, visible, 0.3), ulp=9)


def test_padding_rows_stay_finite():
    q, k, v = normal(1, 3, N, H), normal(1, 3, K, H), normal(1, 3, K, C)
    out = attend(q, k, v, jnp.zeros((1, 3, 3), bool), 1.0)
    assert bool(jnp.isfinite(out).all())
