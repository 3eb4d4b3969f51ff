"""Real decoding in float64: lossless, equal to the walk over the target's own answers, rows ended where they end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreeing import (
    LIMIT,
    STOP,
    STOPS,
    VOCAB,
    V,
    answers,
    assert_lossless,
    assert_stops_cut,
    make_draft,
    make_target,
    own_answers,
    prompts,
    ready,
)  # fmt: skip
from eagle3 import algorithm as make_algorithm

from flaxdraft.decode.decoding import Decoding, Settings, beside
from flaxdraft.decode.speculative import begin
from flaxdraft.devices.mesh import make_mesh
from flaxdraft.errors import InputError
from flaxdraft.evaluate.walk import accept_length, evaluate_teacher_forced, make_accepted
from flaxdraft.train.state import split_draft

NUM, CHAIN = 104, 6  # a chain longer than DISTANCE reads its own tokens
PROMPTS, PADDED = prompts(NUM), 32


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
    return own_answers(target, PROMPTS)


QUICK = {("llama", CHAIN), ("mla", 3)}
FURTHER = (2, 4, 5, 7)  # lengths between those that are tried more often


def marks(name, chain):
    if (name, chain) in QUICK:
        return ()
    return (pytest.mark.slow, pytest.mark.exhaustive) if chain in FURTHER else (pytest.mark.slow,)


CASES = [pytest.param(name, chain, marks=marks(name, chain)) for name in ("llama", "mla") for chain in range(1, 9)]


@pytest.mark.parametrize(("name", "chain"), CASES)
def test_output_is_the_targets_own_and_the_walk_counts_the_same_passes(target, drafts, rows, name, chain):
    draft = drafts[name]
    decoded = Decoding(target, ready(draft), PROMPTS, Settings(LIMIT, chain, STOPS)).finish()
    assert_lossless(decoded, rows, chain)
    graphdef, params, frozen = split_draft(draft)
    algorithm = make_algorithm(chain)
    accepted = make_accepted(graphdef, algorithm, frozen, target.head()[VOCAB.target_ids_W])(params)
    forced = evaluate_teacher_forced(accepted, rows, algorithm, 52)
    assert forced.yields == [one.yields for one in decoded]
    assert forced.accept_length == accept_length([one.yields for one in decoded]) > 1.5
    assert forced.figures()["mean_over_rows"] != forced.accept_length


@pytest.fixture(scope="module")
def run(target, drafts):
    """Decodes with one compiled program."""
    parts = ready(drafts["llama"])

    def run(some, stops=STOPS, on_passes=lambda *report: None):
        settings = Settings(LIMIT, CHAIN, stops)
        return Decoding(target, parts, some, settings, num_rows=NUM, least_length=PADDED).finish(on_passes)

    return run


def test_stop_and_limit_cut_the_same_answer_anywhere(run):
    assert_stops_cut(lambda stops: run(PROMPTS, stops), range(0, V, 16), CHAIN)


def test_a_finished_row_stays_as_it_is_and_a_row_is_its_own(run):
    together = run(PROMPTS)
    assert len({len(one.tokens) for one in together}) > 5
    assert run(PROMPTS[::-1]) == together[::-1]
    assert run(PROMPTS[3:5]) == together[3:5]


def test_several_stop_tokens(rows, run):
    both = run(PROMPTS, stops=(STOP, 11))
    for one, whole in zip(both, answers(rows), strict=True):
        end = next((i + 1 for i, token in enumerate(whole) if token in (STOP, 11)), len(whole))
        assert one.tokens == whole[:end]


def test_progress_adds_up(run, monkeypatch):
    monkeypatch.setattr(Decoding.advance, "__defaults__", (3,))
    reports = []
    decoded = run(PROMPTS, on_passes=lambda *report: reports.append(report))
    assert len(reports) > 1
    passes, tokens = np.sum(reports, axis=0)
    assert passes == sum(len(one.yields) for one in decoded)
    assert tokens == sum(map(sum, (one.yields for one in decoded)))


def test_many_devices_decode_the_same(drafts, run):
    """Seven prompts over eight devices, which hold a quarter of the rows and of the weights; the same passes."""
    split = make_target(jnp.float64, mesh=make_mesh(2, 2, 2))
    draft = beside(split, ready(drafts["llama"]))
    decoding = Decoding(split, draft, PROMPTS[:7], Settings(LIMIT, CHAIN, STOPS))
    for x, parts in ((decoding._carry.cache.k_LBKHS, 8), (split.state["embed"][...], 4)):
        assert x.addressable_shards[0].data.size * parts == x.size
    assert decoding.finish() == run(PROMPTS)[:7]


def test_long_prompts_are_read_in_pieces(run, monkeypatch):
    """Prompts that end in, at and behind a border give what they give when they are read at once."""
    chunk, want = 8, run(PROMPTS)
    assert {0, 1, chunk - 1} <= {len(prompt) % chunk for prompt in PROMPTS}
    assert {1, 2, 3} <= {-(-len(prompt) // chunk) for prompt in PROMPTS}
    monkeypatch.setattr("flaxdraft.decode.speculative.PREFILL_CHUNK", chunk)
    begin.clear_cache()
    assert run(PROMPTS) == want
    begin.clear_cache()


def test_the_target_alone(target, rows):
    alone = Decoding(target, None, PROMPTS, Settings(LIMIT, 0, STOPS)).finish()
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
        Decoding(target, None, some, Settings(LIMIT, 0, (), **settings))
