"""DFlash: what slots predict, which anchors are drawn, packed rows as separate ones, the walk as decoding."""

import dflash
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from contracts import batch_of
from flax import nnx
from test_contracts import TARGET_HF
from test_rejection import PROMPT, TOKENS, V, exact, excess, fill

from flaxdraft.algorithms.dflash import algorithm as algorithm_module
from flaxdraft.algorithms.dflash import anchors
from flaxdraft.algorithms.dflash.drafts import mla, qwen3
from flaxdraft.algorithms.dflash.layout import Layout, layout_of, wanted
from flaxdraft.algorithms.dflash.objective import weights
from flaxdraft.decode.decoding import Decoding, ReadyDraft, Settings
from flaxdraft.devices.sharding import Sharding
from flaxdraft.errors import InputError
from flaxdraft.evaluate.walk import evaluate_teacher_forced, make_accepted
from flaxdraft.evaluate.walk_answers import featured
from flaxdraft.interfaces import Batch, Draw, Example, Features
from flaxdraft.nn.precision import Precision
from flaxdraft.targets import decoder
from flaxdraft.targets import llama as llama_target
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
    ],
    ids=["dflash", "from the anchor, sliding", "mla"],
)
def test_the_walk_is_greedy_decoding(settings, fields, models, monkeypatch):
    """Pass by pass, over runs of every length."""
    target, make = models
    algorithm, draft, chain, rng = dflash.algorithm(**settings), make(**settings, **fields), 3, np.random.default_rng(0)
    assert algorithm.drafter().most_tokens == chain
    prompts = [rng.integers(0, V, rng.integers(1, 9)).tolist() for _ in range(48)]
    ready = ReadyDraft(*nnx.split(draft), algorithm.drafter())
    decoded = Decoding(target, ready, prompts, Settings(20, chain, (-1,))).finish()
    alone = Decoding(target, None, prompts, Settings(20, 0, (-1,))).finish()
    assert [one.tokens for one in decoded] == [one.tokens for one in alone]
    assert {gained for one in decoded for gained in one.yields} == set(range(1, chain + 2))
    texts = [([*prompt, *one.tokens], len(prompt)) for prompt, one in zip(prompts, decoded, strict=True)]
    rows = featured(target, texts, len(texts), 32)
    graphdef, params, frozen = split_draft(draft)
    evaluation = algorithm.drafting(chain)
    monkeypatch.setattr(algorithm_module, "SLOTS_AT_ONCE", 6 * 48 * draft.config.block_size)  # six blocks of a row
    accepted = make_accepted(graphdef, evaluation, frozen, ())(params)
    forced = evaluate_teacher_forced(accepted, rows, evaluation, len(rows))
    assert forced.yields == [one.yields for one in decoded]


@pytest.mark.slow
def test_sampled_answers_are_distributed_as_the_targets(models):
    target, make = models
    draft, num = make(block_size=4), 12_000
    ready = ReadyDraft(*nnx.split(draft), dflash.algorithm(block_size=4).drafter())
    decoded = Decoding(target, ready, [PROMPT] * num, Settings(TOKENS, 2, (-1,), temperature=1.0)).finish()
    yields = np.bincount([gained for one in decoded for gained in one.yields])
    assert (yields[1:] > num // 50).all()  # refused at once, after one token, and accepted whole
    assert excess([one.tokens for one in decoded], exact(target, 1.0)) < 4


def test_packed_documents_are_as_separate_ones(models):
    """Blocks and what they see end at a document's edge; the loss is that of the documents apart."""
    _, make = models
    draft, algorithm = make(block_size=4, **SLIDING), dflash.algorithm(block_size=4)
    rng, length = np.random.default_rng(0), 9
    tokens, taps = rng.integers(0, V, (2, length)), rng.normal(size=(2, length, 3, 8)).astype(np.float32)
    assistant = np.arange(length)[None] >= np.array([[3], [5]])
    positions = np.tile(np.arange(length), (2, 1))
    apart = Batch(tokens, assistant, np.ones_like(tokens), positions)
    packed = Batch(*(x.reshape(1, -1) for x in (tokens, assistant, [[1], [2]] * np.ones_like(tokens), positions)))

    @jax.jit
    def sums(example):
        return algorithm.sums(draft, example, ())

    got, want = (
        sums(Example(batch, Features(taps.reshape(*batch.tokens_BT.shape, 3, 8)), anchors.every(batch, 16)))
        for batch in (packed, apart)
    )
    assert_close(got, want, rtol=2e-6)
    assert int(got.num_blocks) == 5 + 3


def test_answers_shorter_than_a_block_are_refused():
    dflash.algorithm(block_size=8).check_answers(8)
    with pytest.raises(InputError, match=r"algorithm.block_size: found 8, but the longest answer has 7 .* at most 7"):
        dflash.algorithm(block_size=8).check_answers(7)
    with pytest.raises(InputError, match=r"at most 7"):
        dflash.algorithm(block_size=8, sample_from_anchor=True).check_answers(8)
