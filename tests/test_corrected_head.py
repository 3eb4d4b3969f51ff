"""Two cross entropies of one head, corrected and not, against the plain formula: values and every gradient, whatever
the chunk and however the vocabulary is split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close

from flaxdraft.devices.mesh import make_mesh
from flaxdraft.ops.corrected_head import Heads, Inputs, Labels, corrected_cross_entropy
from flaxdraft.ops.cross_entropy import How, Logits

pytestmark = pytest.mark.numeric
B, R, D, E, V, SHARE = 4, 6, 8, 4, 32, 0.3


def make():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    inputs, heads = Inputs(normal(B, R, D), normal(B, R, E)), Heads(normal(V, D), normal(V, E))
    label = jnp.asarray(rng.integers(0, V, (B, R)), jnp.int32)
    right = jnp.argmax(inputs.states_BRD @ heads.frozen_VD.T + inputs.latents_BRE @ heads.correction_VE.T, axis=-1)
    label = jnp.where(jnp.asarray(rng.random((B, R)) < 0.4), right.astype(jnp.int32), label)
    asked = jnp.asarray(rng.random((B, R)) < 0.7)
    weight = jnp.where(asked, jnp.asarray(rng.random((B, R)), jnp.float32), 0)
    return inputs, heads, (Labels(label, weight), asked)


def plain(made_of, inputs, heads, asked, share):
    rows, asked_BR = asked
    base = made_of.of(jnp.einsum("brd,vd->brv", inputs.states_BRD, heads.frozen_VD))
    final = base + jnp.einsum("bre,ve->brv", inputs.latents_BRE, heads.correction_VE)
    found = []
    for logits in (final, base):
        loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), rows.label_BR[..., None], axis=-1)[..., 0]
        hit = (jnp.argmax(logits, axis=-1) == rows.label_BR) & asked_BR
        found += [jnp.where(asked_BR, loss, 0), hit]
    return jnp.sum(rows.weight_BR * ((1 - share) * found[0] + share * found[2])), found


def run(scored, inputs, heads, rows):
    def total(inputs, correction):
        total, *known = scored(inputs, heads._replace(correction_VE=correction), rows)
        return 0.5 * total, (total, jax.tree.leaves(known))

    gradients, found = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(inputs, heads.correction_VE)
    return found, gradients


def ours(how, share):
    return lambda inputs, heads, rows: corrected_cross_entropy(how, inputs, heads, *rows, share)


@pytest.mark.parametrize("how", [How(4), How(64, Logits(0.7, 3.0))], ids=str)
def test_values_and_gradients_are_the_plain_ones(how):
    share, of = jnp.float32(SHARE), make()
    got = run(ours(how, share), *of)
    want = run(lambda *of: plain(how.logits, *of, share), *of)
    np.testing.assert_array_equal(got[0][1][1], want[0][1][1])
    assert got[0][1][1].any()
    assert_close(got, want, summands=V * D)
    alone = ours(how, share)(*of)  # without gradients
    assert_close((alone[0], jax.tree.leaves(alone[1])), got[0], ulp=4)


def test_the_vocabulary_and_the_rows_may_be_split():
    how, share, (inputs, heads, rows) = How(4), jnp.float32(SHARE), make()
    want = run(ours(how, share), inputs, heads, rows)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        put = lambda tree, *spec: jax.device_put(tree, jax.NamedSharding(mesh, jax.P(*spec)))  # noqa: E731
        of = put(inputs, ("data", "fsdp"), None, None), put(heads, "tensor", None), put(rows, ("data", "fsdp"), None)
        got = jax.device_get(run(ours(how, put(share)), *of))
    assert_close(got, jax.device_get(want), summands=V * D)


def test_logits_exist_a_chunk_at_a_time():
    """Nothing as large as [rows, V] is in the compiled program."""
    inputs, heads, rows = jax.tree.map(lambda x: jnp.tile(x, (1, 8, 1)[: x.ndim]) if len(x) == B else x, make())
    total = lambda inputs: corrected_cross_entropy(How(8), inputs, heads, *rows, jnp.float32(SHARE))[0]  # noqa: E731
    text = jax.jit(jax.grad(total)).lower(inputs).as_text()
    assert f"8x{V}x" in text
    assert f"{B * R * 8}x{V}x" not in text
