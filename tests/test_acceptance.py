"""Walked accept length."""

import numpy as np
import pytest

from flaxdraft.evaluate.acceptance import accept_length, histogram, walk


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


def test_nothing_accepted_is_one_and_all_accepted_is_the_chain_plus_one():
    assert accept_length([walk(np.zeros(20, int), 3, 9)]) == 1.0
    assert walk(np.full(20, 3), 3, 9) == [4, 4]
