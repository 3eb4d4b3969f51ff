"""Walked accept length, and sums that do not depend on how the answers were cut into batches and parts."""

import dataclasses
import itertools

import numpy as np
import pytest
from agreeing import VOCAB, make_draft, make_target, prompts
from closeness import assert_close
from eagle3 import algorithm as make_algorithm

from flaxdraft.data.answers import answer_greedily
from flaxdraft.evaluate.results import acceptance
from flaxdraft.evaluate.walk import (
    Part,
    TeacherForced,
    accept_length,
    combine,
    evaluate_teacher_forced,
    histogram,
    make_accepted,
    walk,
)  # fmt: skip
from flaxdraft.ops.step_sums import StepSums
from flaxdraft.train.state import split_draft

STEPS = 2


def simulate(accepted, num_prompt, num_answer):
    """Decoding, token by token: each pass takes the accepted drafts and one token of the target's own."""
    made, passes = 1, []
    while made < num_answer:
        row = num_prompt + made - 2  # the row whose token is the newest one
        before = made
        for _ in range(accepted[row]):
            made += made < num_answer
        made += made < num_answer
        passes.append(made - before)
    return passes


@pytest.mark.parametrize("seed", range(20))
def test_walk_is_decoding(seed):
    rng = np.random.default_rng(seed)
    num_prompt, num_answer = rng.integers(1, 6), rng.integers(1, 12)
    accepted = rng.integers(0, 4, 20)
    got = walk(accepted, num_prompt, num_answer)
    assert got == simulate(accepted, num_prompt, num_answer)
    assert sum(got) == num_answer - 1


def test_accept_length_pools_over_answers():
    assert accept_length([[1, 1], [4]]) == 2.0  # not the mean of 1 and 4
    assert accept_length([[], []]) == 1.0
    assert histogram([[1, 3], [3]], 3).tolist() == [1, 0, 2, 0]


def test_first_passes_are_told_from_later_ones():
    """An answer that ended with its first token has no pass; a last one that made one token may have been cut there."""
    found = acceptance([[3, 1], [], [1, 2, 2, 1]], 2)
    assert found["first_token_accepted"] == {"first_pass": 1 / 2, "later_passes": 2 / 2}
    assert found["acceptance_by_position"][0] == 3 / 6
    found = acceptance([[1, 1, 2], [1]], 2)["first_token_accepted"]
    assert found == {"first_pass": 0.0, "later_passes": 1 / 2}
    assert acceptance([[2], []], 1)["first_token_accepted"] == {"first_pass": 1.0, "later_passes": 0.0}


def test_nothing_accepted_is_one_and_all_accepted_is_the_chain_plus_one():
    assert accept_length([walk(np.zeros(20, int), 3, 9)]) == 1.0
    assert walk(np.full(20, 3), 3, 9) == [4, 4]


@pytest.fixture(scope="module")
def held_out():
    """Eleven answers: no batch size above one divides them."""
    target = make_target()
    rows = answer_greedily(target, prompts(11), 24, [7], 11, lambda num: None)
    graphdef, params, frozen = split_draft(make_draft("llama", target))
    algorithm = make_algorithm(STEPS)
    return make_accepted(graphdef, algorithm, frozen, target.head()[VOCAB.target_ids_W])(params), rows, algorithm


def assert_same(got: Part, want: Part):
    for field in dataclasses.fields(got.sums):
        one, other = getattr(got.sums, field.name), getattr(want.sums, field.name)
        assert_close(one, other, ulp=8, of="each", dtype=np.float32, path=field.name)
    assert (int(got.passes), int(got.gained)) == (int(want.passes), int(want.gained))


@pytest.mark.numeric
def test_any_batch_size_gives_the_same(held_out):
    accepted, rows, algorithm = held_out
    want = evaluate_teacher_forced(accepted, rows, algorithm, 8)
    assert 1.2 < want.accept_length < STEPS + 1
    assert want.total.sums.row_count_J[0] == sum(row.num_answer - 1 for row in rows)
    for batch in (1, 3):
        got = evaluate_teacher_forced(accepted, rows, algorithm, batch)
        assert_same(got.total, want.total)
        assert got.yields == want.yields
        one, other = got.figures(), want.figures()
        for name in ("accept_length", "mean_over_rows", "product_of_marginals"):
            assert_close(one[name], other[name], ulp=16, path=name)
        assert_close(one["loss"], other["loss"], ulp=8, dtype=np.float32)


@pytest.mark.numeric
@pytest.mark.parametrize("shares", [(11,), (6, 5), (3, 5, 3)])
def test_any_number_of_parts_gives_the_same(held_out, shares):
    """Each cut into batches by its own lengths."""
    accepted, rows, algorithm = held_out
    want = evaluate_teacher_forced(accepted, rows, algorithm, 8).total
    edges = np.cumsum([0, *shares])
    parts = [evaluate_teacher_forced(accepted, rows[a:b], algorithm, 8).total for a, b in itertools.pairwise(edges)]
    assert_same(combine(parts), want)
    # The mean of the parts' own ratios is another number.
    if len(shares) == 2:
        own = [part.gained / part.passes for part in parts]
        assert abs(np.mean(own) - want.gained / want.passes) > 1e-4


def forced_of(rows, hits, prefix_hits):
    """Three steps with so many rows and hits each, and no target pass."""
    counts = (np.full(3, value) for value in (0, rows, hits, prefix_hits))
    return TeacherForced(
        Part(StepSums(np.zeros(3), *counts, np.zeros(3), (1.0, 1.0, 1.0)), np.int64(0), np.int64(0)), []
    )


def test_no_pass_at_all_is_no_help_and_no_error():
    nothing = forced_of(0, 0, 0).figures()
    assert [nothing[name] for name in ("accept_length", "mean_over_rows", "product_of_marginals")] == [1.0, 1.0, 0.0]


def test_marginals_are_multiplied_as_reference_trainers_do():
    """Every second row hits nothing, the others everything: joint prefixes give 1 + 3/2, marginals 1/2 + 1/4 + 1/8."""
    figures = forced_of(8, 4, 4).figures()
    assert figures["mean_over_rows"] == 2.5
    assert figures["product_of_marginals"] == 0.875
