"""DFlash: what slots predict, which anchors are drawn, packed rows as separate ones, the walk as decoding."""

import dataclasses
from functools import partial

import dflash
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_walk import assert_samples_are_the_targets, assert_the_walk_is_decoding, packed_and_apart
from closeness import assert_close
from contracts import batch_of
from flax import nnx
from test_contracts import TARGET_HF
from test_rejection import V, fill

from flaxdraft.algorithms.dflash import algorithm as algorithm_module
from flaxdraft.algorithms.dflash import anchors
from flaxdraft.algorithms.dflash.block_attention import Sight
from flaxdraft.algorithms.dflash.drafts import mla, qwen3
from flaxdraft.algorithms.dflash.layout import Layout, layout_of, wanted
from flaxdraft.algorithms.dflash.objective import weights
from flaxdraft.config import TrainConfig
from flaxdraft.devices.sharding import Sharding
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Batch, Draw, Example
from flaxdraft.nn.precision import Precision
from flaxdraft.targets import decoder
from flaxdraft.targets import llama as llama_target
from flaxdraft.train.optimizer import optimizer
from flaxdraft.train.state import split_draft

ROW = Batch(
    np.arange(100, 112)[None], np.array([[0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1]], bool),
    np.array([[1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2]]), np.arange(12)[None],
)  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "anchor", "stop", "asked", "labels"),
    [
        # DFlash: slot k for the token at a + k, slot 0 for nothing.
        (layout_of(4, sample_from_anchor=False), 2, False, [0, 1, 1, 1], [102, 103, 104, 105]),
        (layout_of(4, sample_from_anchor=False), 5, False, [0, 1, 0, 1], [105, 106, 107, 108]),
        (layout_of(4, sample_from_anchor=False), 5, True, [0, 1, 0, 0], [105, 106, 107, 108]),
        # Sampled from the anchor (DSpark's layout, Domino's with shifted labels): slot k for the token at a + 1 + k.
        (layout_of(4, sample_from_anchor=True), 2, False, [1, 1, 1, 1], [103, 104, 105, 106]),
        (layout_of(4, sample_from_anchor=True), 4, False, [1, 1, 0, 1], [105, 106, 107, 108]),
        (layout_of(4, sample_from_anchor=True), 4, True, [1, 1, 0, 0], [105, 106, 107, 108]),
        # Nothing behind the document's end, though the next one is the assistant's, and nothing behind the row's.
        (layout_of(4, sample_from_anchor=True), 8, False, [0, 0, 0, 0], [109, 110, 111, 0]),
        (layout_of(4, sample_from_anchor=False), 10, False, [0, 1, 0, 0], [110, 111, 0, 0]),
        (layout_of(4, sample_from_anchor=False), 12, False, [0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)  # fmt: skip
def test_what_each_slot_predicts(layout, anchor, stop, asked, labels):
    found = wanted(jax.tree.map(jnp.asarray, ROW), jnp.array([[anchor]]), layout, stop_at_hole=stop)
    np.testing.assert_array_equal(found.label_BAS[0, 0], labels)
    np.testing.assert_array_equal(found.asked_BAS[0, 0], np.array(asked, bool))


@pytest.mark.parametrize(("layout", "exponents"), [(Layout(4, 0, 1), [0, 1, 2]), (Layout(4, 1, 0), [0, 1, 2, 3])])
def test_the_first_slot_that_predicts_weighs_one(layout, exponents):
    asked = jnp.arange(4)[None, None] >= layout.first
    got = weights(dflash.algorithm(decay_gamma=3.0).settings, layout, asked, jnp.ones((1, 1, 4)))
    assert_close(np.asarray(got)[0, 0, layout.first :], np.exp(-np.array(exponents, np.float32) / 3), ulp=4)


def test_a_long_block_that_nobody_foresees_has_finite_weights():
    """The product of so many small probabilities is 0."""
    settings = dflash.algorithm(objective="dpace_continuation", dpace_alpha=0, block_size=16).settings
    layout = layout_of(16, sample_from_anchor=False)
    asked, probability = jnp.arange(16)[None, None] >= layout.first, np.exp(-12.0)
    got = weights(settings, layout, asked, jnp.full((1, 1, 16), 12.0))[0, 0]
    assert got[0] == 0
    assert_close(got[1:], np.array([sum(probability**i for i in range(16 - k)) for k in range(1, 16)]), rtol=1e-5)


def test_what_each_layer_sees(models):
    """Sliding layers are causal where nothing else is said, as engines have it."""
    sights = lambda **fields: models[1](block_size=4, **SLIDING, **fields).config.sights()  # noqa: E731
    assert sights() == [Sight(4, True, 5), Sight(4, False, None)]
    assert sights(is_causal=True) == [Sight(4, True, 5), Sight(4, True, None)]
    assert sights(is_causal=False) == [Sight(4, False, 5), Sight(4, False, None)]


def test_a_block_of_one_slot_is_refused(models):
    with pytest.raises(InputError, match=r"draft.fields.block_size: found 1, expected at least 2"):
        models[1](block_size=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_from_anchor": True}, "sample_from_anchor differs from the one in dflash_config"),
        ({"use_sliding_window": True, "layer_types": None}, "use_sliding_window is true without layer_types"),
    ],
)
def test_a_config_that_engines_would_read_otherwise_is_refused(models, changes, message):
    config = models[1](block_size=4).config.to_hf() | changes
    config["dflash_config"] = config["dflash_config"] | {"target_layer_ids": [0, 2, 3], "sample_from_anchor": False}
    with pytest.raises(InputError, match=message):
        qwen3.Config.from_hf(config)


def test_causality_is_read_from_either_place(models):
    config = models[1](block_size=4).config.to_hf() | {"is_causal": None}
    config["dflash_config"] = config["dflash_config"] | {"target_layer_ids": [0, 2, 3], "causal": True}
    assert qwen3.Config.from_hf(config).is_causal is True


def test_values_and_logits_are_scaled_and_capped(models):
    """A scale of all values is one of the layer's outputs; logits are what the loss is computed from."""
    _, make = models
    plain, scaled = make(block_size=4), make(block_size=4, attention_value_scale=1.5)
    for layer in plain.layers:
        layer.self_attn.o_proj.kernel[...] *= 1.5
    algorithm, example = dflash.algorithm(block_size=4, num_anchors=4), dflash.example_of(plain.config)
    example = dataclasses.replace(example, chosen=algorithm.choose(example.batch, 12, Draw(0, 0, 0)))
    text = [algorithm.read(draft, example) for draft in (plain, scaled)]
    anchors_BA = example.chosen.anchor_BA
    got, want = (
        algorithm.states(draft, example.batch, keys, anchors_BA)
        for draft, keys in zip((scaled, plain), text, strict=True)
    )
    assert_close(got, want, ulp=32)
    capped = make(block_size=4, output_multiplier=0.8, final_logit_softcapping=2.0)
    label_BAS, asked_BAS = wanted(example.batch, anchors_BA, algorithm.layout, stop_at_hole=False)
    states_BRD = algorithm.states(capped, example.batch, algorithm.read(capped, example), anchors_BA)
    logits_BRV = 2 * jnp.tanh(0.8 * (states_BRD @ capped.head[...].T) / 2)
    by_label = jnp.take_along_axis(jax.nn.log_softmax(logits_BRV), label_BAS.reshape(*states_BRD.shape[:2], 1), axis=2)
    weight_BAS = weights(algorithm.settings, algorithm.layout, asked_BAS, jnp.zeros(asked_BAS.shape))
    loss = -jnp.sum(by_label.reshape(weight_BAS.shape) * weight_BAS)
    assert_close(algorithm.sums(capped, example, ()).loss, loss, ulp=64)


def test_a_loss_by_rows_depends_on_no_parts_and_no_empty_rows(models, monkeypatch):
    draft, evaluation = models[1](block_size=4), dflash.algorithm(block_size=4, denominator="rows").drafting(3)
    example = dflash.example_of(draft.config)
    example = dataclasses.replace(example, chosen=evaluation.choose(example.batch, 12, Draw(0, 0, 0)))
    whole, counts = evaluation.accepted(draft, example)
    assert int(whole.terms()[1]) == len(counts)
    empty = lambda x: jnp.concatenate([x, jnp.zeros_like(x[:1])])  # noqa: E731
    chosen = evaluation.choose(jax.tree.map(empty, example.batch), 12, Draw(0, 0, 0))
    more = Example(jax.tree.map(empty, example.batch), jax.tree.map(empty, example.features), chosen, ())
    monkeypatch.setattr(algorithm_module, "SLOTS_AT_ONCE", len(chosen.anchor_BA) * 4 * 2)  # two blocks of a row
    parted, parted_counts = evaluation.accepted(draft, more)
    np.testing.assert_array_equal(parted_counts[:-1], counts)
    assert_close(jnp.stack(parted.terms()), jnp.stack(whole.terms()), ulp=16, of="each")


def test_anchors_are_pairs_of_the_assistants_tokens_in_one_document():
    assert np.flatnonzero(anchors.possible(ROW)[0]).tolist() == [2, 3, 4, 5, 9, 10]


def test_the_lowest_numbers_are_kept_in_their_order():
    uniform = np.linspace(1, 0, 11)[None]
    assert anchors.lowest(uniform, anchors.possible(ROW), 4).anchor_BA.tolist() == [[4, 5, 9, 10]]
    assert anchors.lowest(uniform, anchors.possible(ROW), 8).anchor_BA.tolist() == [[2, 3, 4, 5, 9, 10, 12, 12]]


def test_every_step_seed_and_row_draws_anchors_of_its_own():
    algorithm, batch = dflash.algorithm(num_anchors=3), batch_of()
    drawn = [algorithm.choose(batch, 12, Draw(seed, step, 0)).anchor_BA for seed in (0, 1) for step in (0, 1)]
    assert len({x.tobytes() for x in drawn}) == 4
    assert len({row.tobytes() for row in drawn[0]}) > 1
    # All seven that are possible, about as often.
    drawn = [algorithm.choose(batch, 12, Draw(0, step, 0)).anchor_BA for step in range(150)]
    anchor, count = np.unique(np.concatenate(drawn), return_counts=True)
    np.testing.assert_array_equal(anchor, np.arange(4, 11))
    assert abs(count - 150 * len(batch.tokens_BT) * 3 / 7).max() < 4 * np.sqrt(600 * 3 / 7 * 4 / 7)


@pytest.fixture(scope="module")
def models():
    """A target that says one of six tokens and drafts of it, which are so often right by chance."""
    sizes = {
        "vocab_size": V, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 6, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": False,
    }  # fmt: skip
    config = llama_target.Config.from_hf(TARGET_HF | sizes, (0, 2, 3))
    groups = llama_target.groups(config, Precision(), Sharding.none())
    _, state = decoder.abstract_state(config, groups, Precision())
    target = decoder.build(config, groups, fill(state, 0, 1.5), Precision())

    def draft(module=qwen3, **fields):
        made = dflash.make_draft(module.Config(**module.Config.for_target(config, V) | fields), target)
        nnx.update(made, fill(nnx.state(made, nnx.Param), 1, 1.5))
        return made

    return target, draft


SCALES = {"attention_value_scale": 1.5, "output_multiplier": 0.8, "final_logit_softcapping": 2.0, "is_causal": True}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({"block_size": 4}, {}),
        pytest.param({"block_size": 3, "sample_from_anchor": True}, SLIDING | SCALES, marks=pytest.mark.slow),
        pytest.param({"block_size": 4}, {"module": mla}, marks=pytest.mark.slow),
        pytest.param({"block_size": 4}, {"draft_vocab_size": 5, "attention_sink_bias": True}, marks=pytest.mark.slow),
    ],
    ids=["dflash", "from the anchor, sliding", "mla", "reduced, with sinks"],
)
def test_the_walk_is_greedy_decoding(settings, fields, models, monkeypatch):
    target, make = models
    assert_the_walk_is_decoding(target, make(**settings, **fields), dflash.algorithm(**settings), monkeypatch)


@pytest.mark.slow
def test_sampled_answers_are_distributed_as_the_targets(models):
    target, make = models
    assert_samples_are_the_targets(target, make(block_size=4), dflash.algorithm(block_size=4))


def test_a_token_that_the_draft_does_not_know_is_missed_and_trains_nothing(models):
    """Of a draft of the last four of six tokens; its head stays as it came."""
    draft, algorithm = models[1](block_size=4, draft_vocab_size=4), dflash.algorithm(block_size=4, num_anchors=12)
    example = dflash.example_of(draft.config)
    example = dataclasses.replace(example, chosen=algorithm.choose(example.batch, 12, Draw(0, 0, 0)))
    graphdef, params, frozen = split_draft(draft)

    @jax.jit
    def plain(params):
        draft, anchor_BA = nnx.merge(graphdef, params, frozen), example.chosen.anchor_BA
        states_BRD = algorithm.states(draft, example.batch, algorithm.read(draft, example), anchor_BA)
        label_BAS, asked_BAS = wanted(example.batch, anchor_BA, algorithm.layout, stop_at_hole=False)
        logits = (states_BRD @ params["lm_head"][...].T).reshape(*label_BAS.shape, 4)
        known_BAS, label_BAS = asked_BAS & (label_BAS >= 2), label_BAS - 2
        right = jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(label_BAS, 4), axis=-1)
        weight_BAS = weights(algorithm.settings, algorithm.layout, known_BAS, -right)
        hit_BAS = known_BAS & (jnp.argmax(logits, axis=-1) == label_BAS)
        return jnp.stack([jnp.sum(-right * weight_BAS), jnp.sum(weight_BAS)]), hit_BAS, asked_BAS, known_BAS

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def loss(params):
        sums = algorithm.sums(nnx.merge(graphdef, params, frozen), example, ())
        return sums.loss, sums

    terms, hit_BAS, asked_BAS, known_BAS = plain(params)
    gradients, sums = loss(params)
    assert_close(jnp.stack(sums.terms()), terms, ulp=64, of="each")
    assert 0 < int(jnp.sum(known_BAS)) < int(jnp.sum(asked_BAS)) == int(sums.asked_Q.sum())
    np.testing.assert_array_equal(sums.hit_Q, jnp.sum(hit_BAS, axis=(0, 1))[1:])
    assert not np.any(gradients["lm_head"][...])
    assert np.any(gradients["fc"]["kernel"][...])


def test_a_head_that_is_kept_does_not_decay(models):
    params = nnx.state(models[1](block_size=4, draft_vocab_size=4), nnx.Param)
    tx = optimizer(TrainConfig(num_steps=2, weight_decay=0.5))

    @jax.jit
    def second_update(params):
        nothing = jax.tree.map(jnp.zeros_like, params)
        return tx.update(nothing, tx.update(nothing, tx.init(params), params)[1], params)[0]

    flat = nnx.to_flat_state(second_update(params))
    assert {path[0] for path, change in flat if change.ndim > 1 and not np.any(change[...])} == {"lm_head"}


def test_packed_documents_are_as_separate_ones(models):
    """Blocks and what they see end at a document's edge; the loss is that of the documents apart."""
    _, make = models
    draft, algorithm = make(block_size=4, **SLIDING), dflash.algorithm(block_size=4)
    sums = jax.jit(lambda example: algorithm.sums(draft, example, ()))
    got, want = map(sums, packed_and_apart())
    assert_close(got, want, rtol=2e-6)
    assert int(got.num_blocks) == 5 + 3


def test_answers_shorter_than_a_block_are_refused():
    dflash.algorithm(block_size=8).check_answers(8)
    with pytest.raises(InputError, match=r"algorithm.block_size: found 8, but the longest answer has 7 .* at most 7"):
        dflash.algorithm(block_size=8).check_answers(7)
    with pytest.raises(InputError, match=r"at most 7"):
        dflash.algorithm(block_size=8, sample_from_anchor=True).check_answers(8)
