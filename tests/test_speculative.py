"""Real decoding in float64: lossless, equal to the walk over the target's own answers, rows ended where they end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreeing import VOCAB, V, make_draft, make_target, prompts
from flax import nnx

from flaxdraft.algorithms.eagle3 import Algorithm
from flaxdraft.data.generation import answer_greedily
from flaxdraft.errors import InputError
from flaxdraft.evaluate.acceptance import accept_length, evaluate_teacher_forced, make_accepted
from flaxdraft.evaluate.decoding import Decoding, Settings, decode
from flaxdraft.evaluate.speculative import begin
from flaxdraft.mesh import make_mesh
from flaxdraft.train.state import split_draft

LIMIT, STOP, NUM = 24, 7, 104
PROMPTS = prompts(NUM)


@pytest.fixture(scope="module", autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def target():
    return make_target(jnp.float64)


@pytest.fixture(scope="module")
def drafts(target):
    return {name: make_draft(name, target) for name in ("llama", "mla")}


@pytest.fixture(scope="module")
def rows(target):
    """The target's own answers, one token after the other, with features."""
    return answer_greedily(target, PROMPTS, LIMIT, STOP, NUM, lambda num: None)


def answers(rows):
    return [row.tokens[row.num_prompt :].tolist() for row in rows]


QUICK = {("llama", 8), ("mla", 4)}
CASES = [
    pytest.param(name, chain, marks=[] if (name, chain) in QUICK else pytest.mark.slow)
    for name in ("llama", "mla") for chain in range(1, 9)
]  # fmt: skip


@pytest.mark.parametrize(("name", "chain"), CASES)
def test_output_is_the_targets_own_and_the_walk_counts_the_same_passes(target, drafts, rows, name, chain):
    draft = drafts[name]
    decoded = decode(target, nnx.split(draft), PROMPTS, Settings(LIMIT, chain, (STOP,)))
    assert [one.tokens for one in decoded] == answers(rows)
    assert [sum(one.yields) for one in decoded] == [row.num_answer - 1 for row in rows]
    # Runs of every length are accepted, and some are cut by a stop token and by the limit.
    gained = [y for one in decoded for y in one.yields]
    assert set(range(1, chain + 2)) <= set(gained)
    lasts = {(one.tokens[-1] == STOP, one.yields[-1] > 1) for one in decoded if one.yields}
    assert lasts == {(True, True), (True, False), (False, True), (False, False)}

    graphdef, params, frozen = split_draft(draft)
    algorithm = Algorithm(chain)
    accepted = make_accepted(graphdef, algorithm, frozen, target.head()[VOCAB.target_ids_W])(params)
    forced = evaluate_teacher_forced(accepted, rows, algorithm, 52)
    assert forced.yields == [one.yields for one in decoded]
    assert forced.accept_length == accept_length([one.yields for one in decoded]) > 1.5
    assert forced.mean_over_rows() != forced.accept_length


@pytest.fixture(scope="module")
def chain_of_four(target, drafts):
    """Decodes with one compiled program."""
    parts = nnx.split(drafts["llama"])

    def run(some, stops=(STOP, -1), **more):
        return decode(target, parts, some, Settings(LIMIT, 4, stops), num_rows=NUM, **more)

    return run


def test_stop_and_limit_cut_the_same_answer_anywhere(target, rows, chain_of_four):
    """Each answer without stops, cut at each of its tokens in turn by making that token the stop."""
    whole = chain_of_four(PROMPTS, stops=(-1, -1))
    assert all(len(one.tokens) == LIMIT for one in whole)
    cut_at = set()
    for stop in range(0, V, 8):
        for one, want in zip(chain_of_four(PROMPTS, stops=(-1, stop)), whole, strict=True):
            end = want.tokens.index(stop) + 1 if stop in want.tokens else LIMIT
            assert one.tokens == want.tokens[:end]
            assert sum(one.yields) == end - 1
            # The passes are those of the longer answer, the last one cut.
            ends = np.cumsum([1, *want.yields])
            assert np.cumsum([1, *one.yields]).tolist() == [*ends[ends < end], end]
            cut_at.add(int(end - ends[ends < end].max(initial=1)))
    assert {1, 2, 3, 4, 5} <= cut_at


def test_a_finished_row_stays_as_it_is_and_a_row_is_its_own(chain_of_four):
    together = chain_of_four(PROMPTS)
    assert len({len(one.tokens) for one in together}) > 5
    assert chain_of_four(PROMPTS[::-1]) == together[::-1]
    assert chain_of_four(PROMPTS[3:5]) == together[3:5]


def test_several_stop_tokens(rows, chain_of_four):
    both = chain_of_four(PROMPTS, stops=(STOP, 11))
    for one, whole in zip(both, answers(rows), strict=True):
        end = next((i + 1 for i, token in enumerate(whole) if token in (STOP, 11)), len(whole))
        assert one.tokens == whole[:end]


def test_progress_adds_up(chain_of_four, monkeypatch):
    monkeypatch.setattr(Decoding.advance, "__defaults__", (3,))
    reports = []
    decoded = chain_of_four(PROMPTS, on_passes=lambda *report: reports.append(report))
    assert len(reports) > 1
    passes, tokens = np.sum(reports, axis=0)
    assert passes == sum(len(one.yields) for one in decoded)
    assert tokens == sum(map(sum, (one.yields for one in decoded)))


def test_many_devices_decode_the_same(target, drafts, rows):
    """Seven prompts over four devices; each device's loop ends by itself."""
    mesh = make_mesh(4)
    everywhere = jax.NamedSharding(mesh, jax.P())
    settings, some = Settings(LIMIT, 4, (STOP,)), PROMPTS[:7]
    placed = jax.device_put((target, nnx.split(drafts["llama"])[1]), everywhere)
    parts = nnx.split(drafts["llama"])[0], placed[1]
    decoding = Decoding(placed[0], parts, some, settings, mesh=mesh)
    assert decoding._carry.cache.k_LBKHS.sharding.shard_shape(decoding._carry.cache.k_LBKHS.shape)[1] == 2
    while decoding.advance():
        pass
    assert [one.tokens for one in decoding.answers()] == answers(rows)[:7]


def test_long_prompts_are_read_in_pieces(target, drafts, monkeypatch):
    """Prompts that end in, at and behind a border give what they give when they are read at once."""
    parts, settings = nnx.split(drafts["mla"]), Settings(8, 2, (-1,))
    some = [prompts(1, seed=i, longest=2)[0] * num for i, num in enumerate((64, 65, 127, 3, 130))]
    want = decode(target, parts, some, settings)
    monkeypatch.setattr("flaxdraft.evaluate.speculative.PREFILL_CHUNK", 64)
    begin.clear_cache()
    assert decode(target, parts, some, settings) == want
    begin.clear_cache()


def test_the_target_alone(target, rows):
    alone = decode(target, None, PROMPTS, Settings(LIMIT, 0, (STOP,)))
    assert [one.tokens for one in alone] == answers(rows)
    assert all(set(one.yields) <= {1} for one in alone)


@pytest.mark.parametrize(
    ("some", "settings", "message"),
    [
        ([[1], []], {}, "number 1 is empty"),
        ([[1] * 500], {}, r"has 500 tokens; with an answer of 24 it leaves the target's context of 512"),
        ([[1]], {"temperature": -1.0}, "found temperature -1.0 and top_p 1.0"),
        ([[1]], {"top_p": 0.0}, "found temperature 0.0 and top_p 0.0"),
    ],
)
def test_wrong_input(target, some, settings, message):
    with pytest.raises(InputError, match=message):
        decode(target, None, some, Settings(LIMIT, 0, (), **settings))
