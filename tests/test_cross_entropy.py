"""Cross entropy in chunks against the plain formula: values, hits and gradients, whatever the chunk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close

from flaxdraft.ops.cross_entropy import How, Logits, cross_entropy

pytestmark = pytest.mark.numeric
B, R, D, V = 2, 7, 12, 30


def make(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    states, head = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((B, R, D), (V, D)))
    label = jnp.asarray(rng.integers(0, V, (B, R)), jnp.int32)
    right = jnp.argmax(states @ head.T, axis=-1)
    label = jnp.where(jnp.asarray(rng.random((B, R)) < 0.4), right, label).astype(jnp.int32)
    return states, head, label, jnp.asarray(rng.random((B, R)) < 0.7)


def plain(states, head, label, asked, made_of=Logits()):  # noqa: B008 (immutable)
    logits = states @ head.T * made_of.multiplier
    if made_of.cap is not None:
        logits = made_of.cap * jnp.tanh(logits / made_of.cap)
    loss = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, label[..., None], axis=-1)[..., 0]
    return jnp.where(asked, loss, 0), (jnp.argmax(logits, axis=-1) == label) & asked


@pytest.mark.parametrize("how", [How(4), How(64, Logits(0.7, 3.0))], ids=str)
def test_values_and_gradients_are_the_plain_ones(how):
    states, head, label, asked = make()
    weight = jnp.linspace(-1, 2, B * R).reshape(B, R)

    def total(scored):
        return lambda states: (jnp.sum(weight * (out := scored(states))[0]), out)

    def run(scored):
        (_, out), slope = jax.jit(jax.value_and_grad(total(scored), has_aux=True))(states)
        return *out, slope

    got = run(lambda states: tuple(cross_entropy(how, states, head, label, asked)))
    want = run(lambda states: plain(states, head, label, asked, how.logits))
    assert_close(got[0], want[0], summands=V)
    np.testing.assert_array_equal(got[1], want[1])
    assert got[1].any()
    assert_close(got[2], want[2], summands=V)


def test_no_more_rows_are_multiplied_than_there_are():
    states, head, label, asked = make()
    traced = str(jax.make_jaxpr(lambda states: cross_entropy(How(64), states, head, label, asked))(states))
    assert f"[{B * R},{V}]" in traced
    assert f"[64,{V}]" not in traced


def test_the_gradient_may_depend_on_the_losses_themselves():
    """As weights by confidence do: each row's slope is kept unweighted."""
    states, head, label, asked = make()
    weigh = lambda loss: jnp.sum(jax.lax.stop_gradient(jnp.exp(-loss)) * loss)  # noqa: E731
    got = jax.grad(lambda states: weigh(cross_entropy(How(4), states, head, label, asked).loss_BR))(states)
    want = jax.grad(lambda states: weigh(plain(states, head, label, asked)[0]))(states)
    assert_close(got, want, summands=V)


def test_what_is_not_asked_may_be_anything():
    states, head, label, asked = make()
    broken = jnp.where(asked[..., None], states, jnp.nan)
    loss, slope = jax.value_and_grad(lambda x: jnp.sum(cross_entropy(How(4), x, head, label, asked).loss_BR))(broken)
    assert np.isfinite(loss)
    assert np.isfinite(slope).all()
    none = cross_entropy(How(4), states, head, label, jnp.zeros_like(asked))
    assert not none.loss_BR.any()
    assert not none.hit_BR.any()


def test_logits_exist_a_chunk_at_a_time():
    """Nothing as large as [rows, V] is in the compiled program."""
    states, head, label, asked = (
        jnp.tile(x, (1, 40, 1)[: x.ndim]) if x.ndim < 3 and x.shape[0] == B else x for x in make()
    )
    states = jnp.tile(states, (1, 40, 1))
    rows = states.shape[0] * states.shape[1]
    total = lambda x: jnp.sum(cross_entropy(How(8), x, head, label, asked).loss_BR)  # noqa: E731
    text = jax.jit(jax.grad(total)).lower(states).as_text()
    assert f"8x{V}x" in text
    assert f"{rows}x{V}x" not in text
