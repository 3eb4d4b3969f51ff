"""Cross entropy of a head's logits and of the choice among candidates against the plain formula: values and every
gradient, whatever the chunk and however the vocabulary is split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from test_corrected_head import SHARE, B, D, R, V, make, run

from flaxdraft.devices.mesh import make_mesh
from flaxdraft.ops.candidate_head import Candidates, candidate_cross_entropy
from flaxdraft.ops.cross_entropy import How, Logits

pytestmark = pytest.mark.numeric
MOST, FEW = 6, 4


def plain(candidates, made_of, inputs, heads, asked, share):
    """[rows, vocabulary] scores, of which candidates alone count."""
    rows, asked_BR = asked
    unary = made_of.of(jnp.einsum("brd,vd->brv", inputs.states_BRD, heads.frozen_VD))
    added = jnp.einsum("bre,ve->brv", inputs.latents_BRE, heads.correction_VE)
    ranked = jnp.sort(unary, axis=-1)
    among = unary >= ranked[..., -candidates.most, None]
    coupled = unary if candidates.coupled else jax.lax.stop_gradient(unary)
    at_label = lambda x: jnp.take_along_axis(x, rows.label_BR[..., None], axis=-1)[..., 0]  # noqa: E731
    hit = lambda x: (jnp.argmax(x, axis=-1) == rows.label_BR) & asked_BR  # noqa: E731
    covered = at_label(among) & asked_BR
    if candidates.insert:
        one_less = unary >= ranked[..., 1 - candidates.most, None]
        own = jnp.arange(V)[None, None] == rows.label_BR[..., None]
        among = jnp.where(at_label(among)[..., None], among, one_less | own)
    scores = jnp.where(among, coupled + added, -jnp.inf)
    loss = jnp.where(asked_BR, -at_label(jax.nn.log_softmax(unary)), 0)
    # Of labels that are no candidates the logarithm of 0 would have a gradient that is not finite.
    share_of_label = jnp.where(at_label(among) & asked_BR, at_label(jax.nn.softmax(scores)), 1)
    found = [loss, hit(unary), -jnp.log(share_of_label), hit(scores) & covered, covered, hit(scores)]
    return jnp.sum(rows.weight_BR * (found[0] + share * found[2])), found


def ours(candidates, how, share):
    return lambda inputs, heads, rows: candidate_cross_entropy(candidates, how, inputs, heads, *rows, share)


@pytest.mark.parametrize(
    ("how", "candidates"),
    [(How(4), Candidates(MOST, True)), (How(64, Logits(0.7, 3.0)), Candidates(MOST, True)),
     (How(4, Logits(0.7, 3.0)), Candidates(MOST, False)), (How(4), Candidates(FEW, True, insert=True)),
     (How(4, Logits(0.7, 3.0)), Candidates(FEW, False, insert=True))], ids=str,
)  # fmt: skip
def test_values_and_gradients_are_the_plain_ones(how, candidates):
    share, of = jnp.float32(SHARE), make()
    got = run(ours(candidates, how, share), *of)
    want = run(lambda *of: plain(candidates, how.logits, *of, share), *of)
    for i in (1, 3, 4):
        np.testing.assert_array_equal(got[0][1][i], want[0][1][i])
    covered, hit, base_hit = (got[0][1][i].sum() for i in (4, 3, 1))
    best = want[0][1].pop()  # a label that was put among the candidates may win, and is no hit
    assert (best.sum() > hit) == candidates.insert
    assert 0 < hit <= covered < of[2][1].sum()
    assert base_hit > 0
    assert not np.array_equal(got[0][1][1], got[0][1][3])
    assert_close(got, want, summands=V * D)
    alone = ours(candidates, how, share)(*of)  # without gradients
    assert_close((alone[0], jax.tree.leaves(alone[1])), got[0], ulp=4)


@pytest.mark.parametrize(
    "candidates", [Candidates(MOST, True), Candidates(20, True), Candidates(MOST, True, insert=True)], ids=str
)  # fewer and more than a device holds
def test_the_vocabulary_and_the_rows_may_be_split(candidates):
    how, share, (inputs, heads, rows) = How(4), jnp.float32(SHARE), make()
    want = run(ours(candidates, how, share), inputs, heads, rows)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        put = lambda tree, *spec: jax.device_put(tree, jax.NamedSharding(mesh, jax.P(*spec)))  # noqa: E731
        of = put(inputs, ("data", "fsdp"), None, None), put(heads, "tensor", None), put(rows, ("data", "fsdp"), None)
        got = jax.device_get(run(ours(candidates, how, put(share)), *of))
    assert_close(got, jax.device_get(want), summands=V * D)


def test_logits_exist_a_chunk_at_a_time():
    """Nothing as large as [rows, V] is in the compiled program."""
    inputs, heads, rows = jax.tree.map(lambda x: jnp.tile(x, (1, 8, 1)[: x.ndim]) if len(x) == B else x, make())
    scored = ours(Candidates(MOST, True), How(8), jnp.float32(SHARE))
    text = jax.jit(jax.grad(lambda inputs: scored(inputs, heads, rows)[0])).lower(inputs).as_text()
    assert f"8x{V}x" in text
    assert f"{B * R * 8}x{V}x" not in text
