"""Decoding with trees in float64: the target's own output, whichever branch is right, and never less than a chain."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreeing import (
    LIMIT,
    STOPS,
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
from closeness import assert_close
from flax import nnx
from test_serving import randomize

from flaxdraft.algorithms.eagle3.drafter import ChainDrafter
from flaxdraft.decode import speculative
from flaxdraft.decode.decoding import Decoding, Settings, beside
from flaxdraft.decode.speculative import Program
from flaxdraft.decode.tree import Tree
from flaxdraft.devices.mesh import make_mesh
from flaxdraft.errors import InputError
from flaxdraft.evaluate.walk import accept_length

NUM = 104
PROMPTS = prompts(NUM)
SHALLOW, DEEP, WIDE = (2, 2, 1), (2, 2, 1, 1, 1, 1), (4,)  # what is DISTANCE back lies inside a deep tree


@pytest.fixture(scope="module", autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def target():
    return functools.cache(lambda family: make_target(jnp.float64, family=family))


@pytest.fixture(scope="module")
def draft(target):
    """One that knows the next token and is not sure of it: often its second or third is right."""

    @functools.cache
    def make(family, name):
        unsure = make_draft(name, target(family))
        kernel = unsure.lm_head.kernel
        kernel[...] += 2 * np.random.default_rng(3).normal(size=kernel.shape)
        return unsure

    return make


@pytest.fixture(scope="module")
def rows(target):
    return functools.cache(lambda family: own_answers(target(family), PROMPTS))


@pytest.fixture(scope="module")
def run(target, draft):
    @functools.cache
    def call(family, name, widths, some=range(NUM), stops=STOPS, chain=0):
        settings = Settings(LIMIT, chain, stops, tree=widths)
        parts = ready(draft(family, name))
        return Decoding(target(family), parts, [PROMPTS[i] for i in some], settings, num_rows=NUM).finish()

    return call


def yields(decoded):
    return [one.yields for one in decoded]


QUICK = ("llama", "llama", SHALLOW)
# Every family, draft and tree at least once; the other combinations are for changes of trees.
SLOW = [("llama", "mla", DEEP), ("deepseek", "llama", WIDE), ("deepseek", "mla", SHALLOW)]


def marks(case):
    if case == QUICK:
        return ()
    return (pytest.mark.slow,) if case in SLOW else (pytest.mark.slow, pytest.mark.exhaustive)


CASES = [
    pytest.param(*case, marks=marks(case))
    for case in itertools.product(("llama", "deepseek"), ("llama", "mla"), (SHALLOW, DEEP, WIDE))
]


@pytest.mark.parametrize(("family", "name", "widths"), CASES)
def test_output_is_the_targets_own(rows, run, family, name, widths):
    assert_lossless(run(family, name, widths), rows(family), len(widths))


@pytest.mark.parametrize("widths", [SHALLOW, pytest.param(DEEP, marks=pytest.mark.slow)])
def test_a_tree_gains_at_least_what_its_chain_does(run, widths):
    """At a place that both come to, which the first pass is, never less; and more in all, so other branches count."""
    branching, chain = run("llama", "llama", widths), run("llama", "llama", (), chain=len(widths))
    assert [one.tokens for one in branching] == [one.tokens for one in chain]
    assert all(one.yields[:1] >= two.yields[:1] for one, two in zip(branching, chain, strict=True))
    assert accept_length(yields(branching)) > accept_length(yields(chain)) + 0.3


def test_a_pass_hands_on_what_the_target_says_along_its_path(target, draft, rows):
    """Taps and next tokens of the first pass of every answer; its draft extend is fed with them."""
    model, parts = target("llama"), ready(draft("llama", "llama"))
    carry = Decoding(model, parts, PROMPTS, Settings(LIMIT, 0, STOPS, tree=SHALLOW))._carry
    root_B = jnp.asarray([len(prompt) for prompt in PROMPTS])

    @jax.jit
    def first(model, state, carry):
        draft, program = nnx.merge(parts.graphdef, state), Program(parts.drafter, tree=Tree(SHALLOW))
        return speculative._tree_pass(model, draft, program, carry, root_B, carry.answer_BM[:, :1])[2:]

    seen = 0
    for accepted, said_T, taps_TKE, row in zip(
        *jax.device_get(first(model, parts.state, carry)), rows("llama"), strict=True
    ):
        end = min(row.num_prompt + accepted + 1, len(row.tokens) - 1)
        here = slice(row.num_prompt, end)
        seen += max(end - here.start - 1, 0)
        np.testing.assert_array_equal(said_T[: end - here.start], row.tokens[here.start + 1 : end + 1])
        assert_close(taps_TKE[: end - here.start], row.features.taps_BTKE[here], ulp=64)
    assert seen > NUM // 2


@pytest.mark.slow
def test_a_tree_that_does_not_branch_is_the_chain(run):
    assert run("llama", "llama", (1, 1, 1)) == run("llama", "llama", (), chain=3)


def test_stop_and_limit_cut_the_same_answer_anywhere(run):
    assert_stops_cut(lambda stops: run("llama", "llama", SHALLOW, stops=stops), range(1, V, 32), len(SHALLOW))


def test_a_finished_row_stays_as_it_is_and_a_row_is_its_own(run):
    together = run("llama", "llama", SHALLOW)
    assert len({len(one.tokens) for one in together}) > 5
    assert run("llama", "llama", SHALLOW, range(NUM - 9, 2, -1)) == together[NUM - 9 : 2 : -1]


@pytest.mark.slow
def test_many_devices_decode_the_same(draft, rows):
    """Seven prompts over eight devices, which hold a quarter of the rows and of the weights."""
    split = make_target(jnp.float64, mesh=make_mesh(2, 2, 2))
    parts = beside(split, ready(draft("llama", "llama")))
    decoding = Decoding(split, parts, PROMPTS[:7], Settings(LIMIT, 0, STOPS, tree=(2, 1)))
    assert [one.tokens for one in decoding.finish()] == answers(rows("llama"))[:7]


def paths_of(shape):
    """int [leaves, T]: the nodes from the root to each leaf."""
    return np.stack([np.flatnonzero(sees_N) for sees_N in shape.sees_NN[shape.level(len(shape.widths))]])


def test_nodes_are_numbered_depth_by_depth():
    shape = Tree((2, 2, 1))
    assert shape.parent_Q.tolist() == [0, 0, 1, 1, 2, 2, 3, 4, 5, 6]
    assert [shape.level(depth) for depth in range(4)] == [slice(0, 1), slice(1, 3), slice(3, 7), slice(7, 11)]
    assert paths_of(shape).tolist() == [[0, 1, 3, 7], [0, 1, 4, 8], [0, 2, 5, 9], [0, 2, 6, 10]]


@pytest.mark.numeric
@pytest.mark.parametrize("family", ["deepseek", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_node_is_what_its_path_alone_would_be(target, family):
    """Features of every node, and the cache after each path was moved, against an extension by that path."""
    shape, prefix, num_slots = Tree((2, 2, 1)), np.arange(9)[None] + 20, 24
    paths_LT = paths_of(shape)
    model, num = target(family), len(paths_LT)
    tokens_1N = np.random.default_rng(0).integers(0, V, (1, shape.num_nodes))
    cache, _ = model.extend(model.new_cache(1, num_slots), prefix, np.arange(9)[None], "all")
    root_L = np.full(num, 9, np.int32)
    at_LT = root_L[:, None] + np.arange(4, dtype=np.int32)[None]
    chained, want = model.extend(model.fork_cache(cache, num), tokens_1N[0][paths_LT], at_LT, "all")
    positions, placement = shape.place(jnp.asarray(root_L), slice(None), num_slots)
    tokens_LN = tokens_1N.repeat(num, axis=0)
    cache, got = model.extend(model.fork_cache(cache, num), tokens_LN, positions, "all", placement)
    assert_close(jax.tree.map(lambda x: np.asarray(x)[np.arange(num)[:, None], paths_LT], got), want, ulp=64)
    moved = model.move_slots(cache, root_L[:, None] + paths_LT[:, 1:], at_LT[:, 1:])
    assert_close(moved.k_LBKHS[..., :13], chained.k_LBKHS[..., :13], ulp=64)
    assert_close(moved.v_LBKSC[..., :13, :], chained.v_LBKSC[..., :13, :], ulp=64)


@pytest.mark.parametrize("name", ["llama", pytest.param("mla", marks=pytest.mark.slow)])
def test_children_are_the_drafts_likeliest_behind_their_path(target, name):
    """Each path of the tree, drafted as a chain that is told its tokens and says what it would have chosen. The draft
    is a random one, which reads its hidden state and every token."""
    model, shape, num_slots, num_rows = randomize(make_draft(name, target("llama"))), Tree((2, 2, 2, 1, 1, 2)), 80, 3
    rng = np.random.default_rng(0)
    read = jnp.arange(7)[None].repeat(num_rows, 0)
    taps = jnp.asarray(rng.normal(size=(num_rows, 7, 3, 32)))
    drafter, row_B = ChainDrafter(), jnp.full(num_rows, 6)
    state = drafter.read(
        model, drafter.start(model, num_rows, num_slots), taps, jnp.asarray(rng.integers(0, V, (3, 7))), read, row_B
    )
    _, ids_BQ = jax.jit(drafter.propose_tree, static_argnums=3)(model, state, row_B + 1, shape)
    ids_BN = np.pad(ids_BQ, ((0, 0), (1, 0)))

    @jax.jit
    def told(ids_BT):
        def choose(logits_BW, j):
            return ids_BT[:, j], jax.lax.top_k(logits_BW, 2)[1]

        newest_B = row_B + 1
        return drafter.propose(model, state, newest_B, newest_B, len(shape.widths), choose)[1].q_BQW

    for path_T in paths_of(shape):
        likeliest_BQ2 = np.asarray(told(jnp.asarray(ids_BN[:, path_T[1:]])))
        for depth, (node, width) in enumerate(zip(path_T[:-1], shape.widths, strict=True)):
            children = np.flatnonzero(shape.parent_Q == node) + 1
            np.testing.assert_array_equal(ids_BN[:, children], likeliest_BQ2[:, depth, :width])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.5}, "tree: found one with temperature 0.5 and a chain of 0; .* verified greedily"),
        ({"chain_length": 3}, "tree: found one with temperature 0 and a chain of 3; .* takes the place of a chain"),
        ({"tree": (3, 0)}, "tree: found widths 3 0, expected each at least 1"),
        ({"tree": (9, 9, 9)}, "tree: widths 9 9 9 make 819 draft tokens a target pass, expected at most 512"),
        ({"tree": (60,)}, "tree: found width 60, expected at most the draft's 57 tokens"),
    ],
)
def test_wrong_trees(target, draft, settings, message):
    settings = {"max_new_tokens": LIMIT, "chain_length": 0, "stop_tokens": (), "tree": SHALLOW} | settings
    with pytest.raises(InputError, match=message):
        Decoding(target("llama"), ready(draft("llama", "llama")), [[1]], Settings(**settings))
