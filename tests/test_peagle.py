"""P-EAGLE: which elements are drawn, what each sees, packed rows as separate ones, the walk as decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import peagle
import pytest
from closeness import assert_close
from contracts import batch_of
from flax import nnx
from test_contracts import TARGET_HF
from test_rejection import PROMPT, TOKENS, V, exact, excess, fill

from flaxdraft.algorithms.eagle3.objective import UnrollOptions
from flaxdraft.algorithms.peagle.depths import chains, every
from flaxdraft.algorithms.peagle.drafts import llama
from flaxdraft.algorithms.peagle.objective import states
from flaxdraft.decode.decoding import Decoding, ReadyDraft, Settings
from flaxdraft.devices.sharding import Sharding
from flaxdraft.errors import InputError
from flaxdraft.evaluate.walk import evaluate_teacher_forced, make_accepted
from flaxdraft.evaluate.walk_answers import featured
from flaxdraft.interfaces import Batch, Draw, Example, Features, VocabMap
from flaxdraft.nn.precision import Precision
from flaxdraft.ops.attention import attend
from flaxdraft.targets import decoder
from flaxdraft.targets import llama as llama_target
from flaxdraft.train.state import split_draft

# x_{p+1} and x_{p+2} are the assistant's at places 1..3, and in the second document at 8.
CAN = np.array([0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0], bool)
SEGMENTS = np.array([1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2])


@pytest.mark.parametrize(
    ("settings", "uniform", "anchors"),
    [
        # (4 - 1) of the places 1, 2, 3 (8 begins its document), then those behind the kept ones.
        ({"down_sample_ratio": 1.0}, 0, [[0, 1, 2], [0, 1]]),
        ({"down_sample_ratio": 0.5}, -np.arange(11), [[2], []]),  # int(3 * 0.5) = 1: place 3, behind which is none
        ({"down_sample_ratio": 0.5}, np.arange(11), [[0], []]),  # int(2 * 0.25) = 0
        ({"down_sample_ratio": 0.5, "down_sample_ratio_min": 0.5}, np.arange(11), [[0], [0]]),
        ({"down_sample_ratio": 0.1, "down_sample_ratio_min": 0.0}, 0, [[], []]),
    ],
)
def test_which_elements_are_drawn(settings, uniform, anchors):
    settings = peagle.algorithm(num_depths=3, **settings).settings
    found = chains(CAN, SEGMENTS, np.broadcast_to(uniform, (2, 11)), settings)
    assert [own.tolist() for own in found] == anchors


def test_whoever_has_a_depth_has_those_before():
    algorithm, batch = peagle.algorithm(num_depths=4, down_sample_ratio=0.9), batch_of()
    chosen = algorithm.choose(batch, 12, Draw(0, 0, 0))
    for depth, parents_BR in enumerate(chosen.parents, 1):
        before_BR, own_BR = chosen.anchors[depth - 1], chosen.anchors[depth]
        there_BR = parents_BR < before_BR.shape[1]
        assert there_BR.any()
        if depth > 1:
            np.testing.assert_array_equal(there_BR, own_BR < batch.tokens_BT.shape[1])
        found_BR = np.take_along_axis(before_BR, np.minimum(parents_BR, before_BR.shape[1] - 1), axis=1)
        np.testing.assert_array_equal(found_BR[there_BR], own_BR[there_BR])


def test_every_step_seed_and_row_draws_elements_of_its_own():
    algorithm, batch = peagle.algorithm(num_depths=2, down_sample_ratio=0.5), batch_of()
    drawn = [algorithm.choose(batch, 12, Draw(seed, step, 0)).anchors[1] for seed in (0, 1) for step in (0, 1)]
    assert len({x.tobytes() for x in drawn}) == 4
    assert len({row.tobytes() for row in drawn[0]}) > 1


@pytest.fixture(scope="module")
def target():
    """It says one of six tokens, so that drafts of it are often right by chance."""
    sizes = {
        "vocab_size": V, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 6, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": False,
    }  # fmt: skip
    config = llama_target.Config.from_hf(TARGET_HF | sizes, (0, 2, 3))
    groups = llama_target.groups(config, Precision(), Sharding.none())
    _, state = decoder.abstract_state(config, groups, Precision())
    return decoder.build(config, groups, fill(state, 0, 1.5), Precision())


def draft_of(target, draft_vocab_size=V - 1, **fields):
    config = llama.Config(**llama.Config.for_target(target.config, draft_vocab_size) | fields)
    made = peagle.make_draft(config, VocabMap(np.arange(draft_vocab_size), V), target)
    nnx.update(made, fill(nnx.state(made, nnx.Param), 4, 1.5))
    return made


@pytest.fixture(scope="module")
def draft(target):
    return draft_of(target)


def test_a_draft_begins_with_the_targets_embedding_and_head_and_keeps_its_own(target):
    config, vocab = llama.Config(**llama.Config.for_target(target.config, V)), VocabMap(np.arange(V), V)
    draft = peagle.make_draft(config, vocab, target)
    np.testing.assert_array_equal(draft.embed_tokens[...], target.embedding())
    peagle.algorithm().warm_start(draft, target, vocab)
    np.testing.assert_array_equal(draft.lm_head.kernel[...], target.head().T)
    _, params, _ = split_draft(draft)
    assert {"embed_tokens", "mask_hidden"} <= {path[0] for path, _ in nnx.to_flat_state(params)}


@pytest.mark.parametrize("attention", ["dense", "chunked"])
def test_what_each_element_sees(draft, attention):
    """Against attention over all pairs of elements, with the mask of the paper written down."""
    rng, length, depths = np.random.default_rng(0), 9, 3
    segments, positions = np.array([[1] * 5 + [2] * 3 + [0]]), np.array([[0, 1, 2, 3, 4, 0, 1, 2, 0]])
    batch = Batch(rng.integers(0, V, (1, length)), segments > 0, segments, positions)
    taps = rng.normal(size=(1, length, 3, 8)).astype(np.float32)
    chosen = every(batch, length, depths)
    got = states(draft, batch, jnp.asarray(taps), chosen, UnrollOptions(attention, "none", 4))

    anchors = np.concatenate([np.arange(length), *(at[0] for at in chosen.anchors[1:])])
    depth = np.repeat(np.arange(depths), [length, *(at.shape[1] for at in chosen.anchors[1:])])
    anchors, depth = anchors[anchors < length], depth[anchors < length]
    document = segments[0][anchors]
    sees = (document[:, None] == document[None]) & (document > 0)[:, None] & (
        ((depth == 0)[None] & (anchors[:, None] >= anchors[None]))
        | ((anchors[:, None] == anchors[None]) & (depth[:, None] >= depth[None]))
    )  # fmt: skip
    tokens = np.where(depth == 0, np.append(batch.tokens_BT[0, 1:], 0)[anchors], draft.config.mask_token_id)
    state = np.where((depth == 0)[:, None, None], taps[0][anchors], draft.mask_hidden[...].reshape(1, 3, 8))
    hidden = draft.project(jnp.asarray(state)[None])
    projected = draft.projections(draft.token_projections(draft.embed(jnp.asarray(tokens)[None])), hidden)
    finish, heads, at = draft.finish, draft.self_attn, jnp.asarray(positions[:, anchors] + depth)
    for layer in [*draft.further, None]:
        kv = heads.key_value(projected, at)
        seen = attend(heads.query(projected, at), *kv, jnp.asarray(sees)[None], heads.softmax_scale)
        hidden = finish(hidden, seen)
        if layer is not None:
            projected, finish, heads = layer.project(hidden), layer.finish, layer.self_attn
    asked = np.concatenate([np.isin(np.arange(length), chosen.anchors[0][0]), np.ones(len(depth) - length, bool)])
    real = np.concatenate([at[0] for at in chosen.anchors]) < length
    assert real.sum() == asked.sum() == 7
    assert_close(np.asarray(got)[0, real], np.asarray(hidden)[0, asked], rtol=2e-5)


def test_the_walk_is_greedy_decoding(target, draft):
    """Pass by pass, over runs of every length; one token of the target's is unknown to the draft."""
    algorithm, chain, rng = peagle.algorithm(), 3, np.random.default_rng(0)
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
    teacher = evaluation.teacher(target, VocabMap(np.arange(V - 1), V), jnp.float32)
    accepted = make_accepted(graphdef, evaluation, frozen, teacher)(params)
    forced = evaluate_teacher_forced(accepted, rows, evaluation, len(rows))
    assert forced.yields == [one.yields for one in decoded]
    figures = forced.figures()
    assert figures["mean_over_rows"] > 1
    assert len(figures["accuracy"]) == chain


@pytest.mark.slow
def test_sampled_answers_are_distributed_as_the_targets(target, draft):
    num, ready = 12_000, ReadyDraft(*nnx.split(draft), peagle.algorithm().drafter())
    decoded = Decoding(target, ready, [PROMPT] * num, Settings(TOKENS, 2, (-1,), temperature=1.0)).finish()
    yields = np.bincount([gained for one in decoded for gained in one.yields])
    assert (yields[1:] > num // 50).all()  # refused at once, after one token, and accepted whole
    assert excess([one.tokens for one in decoded], exact(target, 1.0)) < 4


@pytest.mark.slow  # that no element sees another document is seen above
def test_packed_documents_are_as_separate_ones(target, draft):
    """Chains and what they see end at a document's edge; the loss is that of the documents apart."""
    algorithm, rng, length = peagle.algorithm(num_depths=3).drafting(3), np.random.default_rng(0), 9
    tokens, shape = rng.integers(0, V, (2, length)), (2, length)
    told = rng.normal(size=(*shape, 3, 8)), rng.normal(size=(*shape, 8)), tokens, np.full(shape, 4.0)
    assistant = np.arange(length)[None] >= np.array([[3], [5]])
    apart = Batch(tokens, assistant, np.ones_like(tokens), np.tile(np.arange(length), (2, 1)))
    packed = Batch(*(x.reshape(1, -1) for x in (tokens, assistant, [[1], [2]] * apart.segments_BT, apart.positions_BT)))
    teacher = algorithm.teacher(target, VocabMap(np.arange(V - 1), V), jnp.float32)

    @jax.jit
    def sums(example):
        return algorithm.sums(draft, example, ())

    def example(batch):
        features = Features(*(np.float32(x).reshape(*batch.tokens_BT.shape, *x.shape[2:]) for x in told))
        features = Features(features.taps_BTKE, features.last_BTE, batch.tokens_BT, features.logsumexp_BT)
        return Example(batch, features, algorithm.choose(batch, 16, Draw(0, 0, 0)), teacher)

    got, want = sums(example(packed)), sums(example(apart))
    assert_close(got, want, rtol=3e-6)
    assert got.asked_D.tolist() == [5 + 3, 4 + 2, 3 + 1]


def test_answers_shorter_than_a_chain_are_refused():
    peagle.algorithm(num_depths=7).check_answers(8)
    with pytest.raises(InputError, match=r"algorithm.num_depths: found 7, but the longest answer has 7 .* at most 6"):
        peagle.algorithm(num_depths=7).check_answers(7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_token_id": V}, rf"draft.fields.mask_token_id: found {V}, expected a token of the target, 0..{V - 1}"),
        ({"mask_token_id": True}, r"draft.fields.mask_token_id: found True"),
        ({"norm_output": True}, r"draft.fields.norm_output: found true; .* no next step"),
        ({"num_hidden_layers": 0}, r"draft.fields.num_hidden_layers: found 0, expected a positive integer"),
    ],
)
def test_sizes_that_no_draft_has_are_refused(target, fields, message):
    with pytest.raises(InputError, match=message):
        llama.Config(**llama.Config.for_target(target.config, V) | fields)
