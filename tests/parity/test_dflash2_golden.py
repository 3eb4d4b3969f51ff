"""DFlash2 against one forward and backward pass of the PyTorch reference: states, candidates, scores, losses,
gradients, and the path that its selector takes. Needs no PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_golden import draft_of, golden
from closeness import assert_close
from flax import nnx

from flaxdraft.algorithms.dflash.anchors import Anchors
from flaxdraft.algorithms.dflash2.algorithm import Algorithm
from flaxdraft.algorithms.dflash2.drafts import qwen3
from flaxdraft.algorithms.dflash2.settings import Settings
from flaxdraft.files.name_tables import state_to_torch
from flaxdraft.interfaces import Batch, Example, Features
from flaxdraft.nn.layers import Frozen
from flaxdraft.ops import vocabulary_axis

pytestmark = pytest.mark.numeric


def reference():
    """The golden, whose weights have their names in memory, by those on disk."""
    of = golden("dflash2_a")
    on_disk = {key.replace("codebook.weight", "codebook"): x for key, x in of.tensors.items()}
    return of._replace(tensors=on_disk)


def example_of(of) -> Example:
    """Each text with its one block: the context, the newest token and the labels behind it."""
    taps, blocks, labels = (of.tensors[name] for name in ("in.hidden_states", "in.block_ids", "in.labels"))
    num_rows, context = taps.shape[:2]
    # The rows of the block itself, whose states nobody may read.
    taps = np.pad(taps, ((0, 0), (0, labels.shape[1] + 1), (0, 0)), constant_values=7.0)
    text = np.zeros((num_rows, context), np.int32)
    tokens = np.concatenate([text, blocks[:, :1], labels], axis=1).astype(np.int32)
    positions = np.tile(np.arange(tokens.shape[1]), (num_rows, 1))
    batch = Batch(tokens, positions >= context, np.ones_like(tokens), positions)
    chosen = Anchors(np.full((num_rows, 1), context, np.int32))
    features = Features(taps.reshape(*tokens.shape, 3, -1))
    return jax.tree.map(jnp.asarray, Example(batch, features, chosen, ()))


@functools.cache
def passed():
    """The golden; states, candidates and scores of the text's own tokens; what is known of slots; sums and gradients;
    what the drafter proposes."""
    of = reference()
    o = of.meta["options"]
    algorithm = Algorithm(Settings(
        block_size=o["block"], decay_gamma=o["gamma"], selector_alpha=o["selector_loss_alpha"], loss_chunk=5
    ))  # fmt: skip
    example, draft = example_of(of), draft_of(qwen3, of)
    graphdef, params, frozen = nnx.split(draft, nnx.Param, Frozen)

    @jax.jit
    def run(params):
        def loss(params):
            sums = algorithm.sums(nnx.merge(graphdef, params, frozen), example, algorithm.first_carry())
            return jnp.divide(*sums.terms()), sums

        return jax.value_and_grad(loss, has_aux=True)(params)

    @jax.jit
    def known(params):
        draft, anchor_BA = nnx.merge(graphdef, params, frozen), example.chosen.anchor_BA
        text = algorithm.read(draft, example)
        hidden_BSD = algorithm.states(draft, example.batch, text, anchor_BA)
        logits_BQV, before_BQ = draft.logits(hidden_BSD[:, 1:]), example.batch.tokens_BT[:, o["context"] : -1]
        latents = draft.selector.latents(hidden_BSD[:, 1:], before_BQ)
        flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
        top, ids = vocabulary_axis.top(flat(logits_BQV), o["dflash_config"]["selector_top_k"], None)
        scores = draft.selector.scores(top, ids, flat(latents))
        choose = lambda logits_BV, j: (jnp.argmax(logits_BV, axis=1), None)  # noqa: E731
        path = algorithm.drafter().chosen(draft, hidden_BSD[:, 1:], example.batch.tokens_BT[:, o["context"]], choose)
        found = algorithm.scored(draft, draft.head_VD(), example, text, anchor_BA)
        return hidden_BSD, logits_BQV, ids, scores, found, jnp.stack([token_B for token_B, _ in path], axis=1)

    (value, sums), gradients = run(params)
    return of, known(params), value, sums, state_to_torch(gradients, qwen3.name_table(draft.config), np.float32)


def test_states_candidates_and_scores():
    of, (hidden, logits, ids, scores, _, _), *_ = passed()
    assert_close(hidden, of.tensors["out.hidden"], rtol=1e-5)
    assert_close(logits, of.tensors["out.unary_logits"], rtol=1e-5)
    shape = of.tensors["out.candidates"].shape
    np.testing.assert_array_equal(ids.reshape(shape), of.tensors["out.candidates"])
    assert_close(scores.reshape(shape), of.tensors["out.selector_scores_teacher_forced"], rtol=1e-5)


def test_the_path_is_the_references():
    of, (*_, path), _, _, _ = passed()
    np.testing.assert_array_equal(path, of.tensors["out.path_greedy"])
    assert of.meta["results"]["unary_argmax_differs_from_path"] > 0.5


def test_losses():
    of, (*_, found, _), value, sums, _ = passed()
    tensors, slots = of.tensors, np.s_[:, 0, 1:]
    np.testing.assert_array_equal(found.covered_BAS[slots], tensors["out.covered"])
    assert_close(found.weight_BAS[slots], tensors["mid.weights"], rtol=1e-6)
    assert_close(found.loss_BAS[slots], tensors["out.ce"], rtol=1e-5)
    assert_close(found.choice_loss_BAS[slots], tensors["out.selector_ce"], rtol=1e-5)
    right = tensors["out.unary_logits"].argmax(axis=2) == tensors["in.labels"]
    np.testing.assert_array_equal(found.base_hit_BAS[slots], right)
    best = tensors["out.selector_scores_teacher_forced"].argmax(axis=2)[..., None]
    chosen = np.take_along_axis(tensors["out.candidates"], best, axis=2)[..., 0]
    np.testing.assert_array_equal(found.hit_BAS[slots], chosen == tensors["in.labels"])
    assert_close(float(value), of.meta["results"]["loss"], rtol=1e-5)
    assert_close(sums.figures()["candidate_coverage"], of.meta["results"]["coverage"], rtol=1e-6)


def test_every_gradient():
    of, *_, got = passed()
    wanted = of.of("g.")
    assert set(wanted) == set(got)
    assert_close(got, wanted, rtol=1e-4, of="norm")
