"""What of the cuDNN attention can be checked without a GPU: its layout, against kernels written out in plain JAX, and
that the private names which it needs are where they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close

from flaxdraft.algorithms.eagle3.suffix_attention import Cudnn, Suffix, choose, dense, merged
from flaxdraft.errors import InputError
from flaxdraft.ops import cudnn_attention
from flaxdraft.ops.attention import MASKED, KeyRange, grouped_scores
from flaxdraft.targets import target_attention

pytestmark = pytest.mark.numeric


def scores_of(q, k, length_B, scale):
    """Causal scores [B, N, T, S] up to each row's length, as the kernels see them."""
    B, T, N, _ = q.shape
    at = jnp.arange(T)
    seen = (at[None, :, None] >= at[None, None]) & (at[None, None] < length_B[:, None, None])
    return jnp.where(seen[:, None], grouped_scores(q, k, scale).reshape(B, N, T, T), MASKED)


def kernel(direction, arrays, extra, length_B, scale, is_training=False):
    """cuDNN's contract: forward with logsumexp; backward from a given output and logsumexp. What lies past a row's
    length is not defined, here NaN."""
    q, k, v = arrays
    group = q.shape[2] // k.shape[2]
    scores = scores_of(q, k, length_B, scale)
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    past = (jnp.arange(q.shape[1])[None] >= length_B[:, None])[:, :, None, None]
    undefined = lambda x: jnp.where(past, jnp.nan, x)  # noqa: E731
    if direction == "fwd":
        assert is_training
        logsumexp = jax.nn.logsumexp(scores, axis=-1)
        out = jnp.einsum("bnts,bsnc->btnc", jnp.exp(scores - logsumexp[..., None]), v)
        return [undefined(out), jnp.where(past[..., 0].swapaxes(1, 2), jnp.nan, logsumexp)]
    logsumexp, out, grad = extra
    defined = lambda x: jnp.where(past, 0.0, x)  # noqa: E731 (a kernel does not read rows past the length)
    q, k, v, grad, out = (defined(x) for x in (q, k, v, grad, out))
    weights = jnp.where(past[:, None, :, 0, 0, None], 0.0, jnp.exp(scores - logsumexp[..., None]))
    toward = jnp.einsum("btnc,bsnc->bnts", grad, v) - jnp.moveaxis(jnp.sum(grad * out, -1), 1, 2)[..., None]
    dscores = weights * toward * scale
    by_head = lambda x: x.reshape(*x.shape[:2], -1, group, x.shape[-1]).sum(3)  # noqa: E731
    dk, dv = jnp.einsum("bnts,btnh->bsnh", dscores, q), jnp.einsum("bnts,btnc->bsnc", weights, grad)
    return [undefined(x) for x in (jnp.einsum("bnts,bsnh->btnh", dscores, k), by_head(dk), by_head(dv))]


def make(starts, num_keys=16, heads=4, kv_heads=2, width=8, value_width=4, seed=0):
    """Half of the rows are queries; batch rows end at different places."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    document = np.searchsorted(starts, np.arange(num_keys), side="right") - 1
    first, last = np.zeros((2, 2, num_keys // 2), int)
    for b, end in enumerate((num_keys, num_keys - 5)):
        rows = np.sort(rng.permutation(np.arange(starts[0], end))[: end // 2 - 1])
        last[b] = -1
        last[b, : len(rows)], first[b, : len(rows)] = rows, np.asarray(starts)[document[rows]]
    queries = last.shape[1]
    arrays = (
        normal(2, queries, heads, width), normal(2, num_keys, kv_heads, width),
        normal(2, num_keys, kv_heads, value_width),
        Suffix((normal(2, queries, kv_heads, width),), (normal(2, queries, kv_heads, value_width),)),
    )  # fmt: skip
    return arrays, KeyRange(jnp.asarray(first), jnp.asarray(last))


@pytest.mark.parametrize(
    ("starts", "packed"), [([0], False), ([0], True), ([0, 3, 4, 11], True), ([2, 9], True)],
    ids=["one document", "one, could be more", "packed", "padding before"],
)  # fmt: skip
def test_layout_gives_the_dense_values_and_gradients(starts, packed, monkeypatch):
    monkeypatch.setattr(cudnn_attention, "_call", kernel)
    arrays, seen = make(starts)
    sees = (seen.first_BR <= seen.last_BR)[:, :, None, None]

    def loss(attention, arrays):
        out = jnp.where(sees, attention(*arrays, seen, 0.4), 0.0)
        return jnp.sum(jnp.sin(out) * jnp.arange(out.size).reshape(out.shape)), out

    fast = lambda *x: merged(*x, Cudnn(packed))  # noqa: E731
    (got, want) = (jax.jit(jax.value_and_grad(lambda a, f=f: loss(f, a), has_aux=True))(arrays) for f in (fast, dense))
    assert_close(got, want, ulp=64)


def test_the_private_names_are_where_they_were():
    """Fails when JAX moves or changes them: then `ops/cudnn_attention.py` needs work; users get chunks meanwhile."""
    assert cudnn_attention.moved() is None


@pytest.mark.parametrize("packed", [True, False])
def test_both_kernels_accept_these_arguments(packed):
    """Traced only: the kernels themselves need a GPU."""
    arrays, seen = make([0, 3], width=16, value_width=8)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays)

    def loss(arrays):
        return merged(*arrays, seen, 0.4, Cudnn(packed)).astype(jnp.float32).sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(narrow))
    assert "dot_product_attention_fwd" in text
    assert "dot_product_attention_bwd" in text
    assert "cond" not in text  # the host waits for nothing


def test_a_target_reads_packed_rows_with_it(monkeypatch):
    """Documents with padding behind them, and one that fills its row."""
    (q, k, v, _), _ = make([0], num_keys=32)
    q, k, v = (x[:, :16] for x in (q, k, v))
    segments = jnp.asarray([[1] * 5 + [2] * 7 + [0] * 4, [1] * 16])
    softmax = target_attention.Softmax(0.4)
    attention = lambda *x: jax.jit(lambda *x: target_attention.uncached(*x, softmax))(*x)  # noqa: E731 (traced anew)
    want = attention(q, k, v, segments)
    monkeypatch.setattr(target_attention, "DENSE_SCORES", 0)
    monkeypatch.setattr(cudnn_attention, "unavailable", lambda q, v: None)
    calls = []
    monkeypatch.setattr(cudnn_attention, "_call", lambda *x, **how: calls.append(1) or kernel(*x, **how))
    got = attention(q, k, v, segments)
    assert calls
    assert_close(got[segments > 0], want[segments > 0], ulp=80)


def test_a_jax_without_the_names_falls_back_with_a_warning(monkeypatch):
    monkeypatch.setattr(cudnn_attention, "moved", lambda: "jax 99 has no such thing")
    monkeypatch.setattr(cudnn_attention, "unavailable", lambda q, v: cudnn_attention.moved())
    arrays, _ = make([0])
    long = [jax.ShapeDtypeStruct((1, 4096, *x.shape[2:]), x.dtype) for x in arrays[:3]]
    for backend, given in (("cudnn", arrays), ("auto", long)):
        with pytest.warns(UserWarning, match="attention in chunks instead of cuDNN.*jax 99 has no such thing"):
            assert choose(backend, *given[:3]) == "chunked"


def test_auto_takes_whole_scores_where_few_then_cudnn_where_it_runs(monkeypatch):
    short = [jax.ShapeDtypeStruct((1, 64, 4, 128), jnp.bfloat16)] * 3
    long = [jax.ShapeDtypeStruct((1, 4096, 4, 128), jnp.bfloat16)] * 3
    assert [choose("auto", *x) for x in (short, long)] == ["dense", "chunked"]
    monkeypatch.setattr(cudnn_attention, "unavailable", lambda q, v: None)
    assert [choose("auto", *x) for x in (short, long)] == ["dense", "cudnn"]


def test_asked_for_by_name_where_it_cannot_run():
    arrays, _ = make([0])
    with pytest.raises(InputError, match="attention: cudnn cannot run here: it needs an NVIDIA GPU, found cpu"):
        choose("cudnn", *arrays[:3])
