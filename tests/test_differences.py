"""Answers with a draft that part from the target's own: nearly equal tokens are told from wrong ones."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from multidevice.test_target_sharding import make

from flaxdraft.decode.decoding import Decoded
from flaxdraft.decode.generation import generate
from flaxdraft.errors import WrongAnswersError
from flaxdraft.evaluate.differences import (
    LIMIT,
    Choice,
    Difference,
    differences,
    first_differences,
    refuse_wrong_answers,
    rounding_unit,
)
from flaxdraft.evaluate.measure import Guess, Measured, Timing, Turn

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
NAMES = ("low", "tie", "same")


def session_of(target):
    return SimpleNamespace(target=target, tokenizer=SimpleNamespace(decode=str), num_rows=2)


def measured(answers):
    turns = [
        Turn(name, 0, prompt, Decoded([*answer], []))
        for name, prompt, answer in zip(NAMES, PROMPTS, answers, strict=True)
    ]
    return Measured(Guess(), 0, turns, Timing())


def parted(answer, position, token):
    return [*answer[:position], token, *answer[position + 1 :]]


@pytest.fixture(scope="module")
def own():
    target = make("qwen3", tie_word_embeddings=False)
    return target, [[*map(int, answer)] for answer in generate(target, PROMPTS, max_new_tokens=6, stop_tokens=())]


def twins(target, of, other, scale=1.0):
    """The target with another token's logit equal to one's."""
    head_VE, head = target.head(), np.array(target.head())
    head[other] = head[of] * np.float32(scale)
    state = {**target.state, "head": target.state["head"].replace(jax.device_put(head, head_VE.sharding))}
    return dataclasses.replace(target, state=type(target.state)(state))


def test_the_first_other_token_of_a_conversation_counts():
    def turn(name, number, prompt, tokens):
        return Turn(name, number, prompt, Decoded(tokens, []))

    def run(*turns):
        return Measured(Guess(), 0, [*turns], Timing())

    alone = run(turn("a", 0, [1], [2, 3, 4]), turn("a", 1, [1, 2, 3, 4, 5], [6]), turn("b", 0, [1], [7]))
    drafted = run(turn("a", 0, [1], [2, 9, 4]), turn("a", 1, [1, 2, 9, 4, 5], [8]), turn("b", 0, [1], [7, 8]))
    found = first_differences(drafted, alone)
    assert [(one.question, one.turn, position) for one, _, position in found] == [("a", 0, 1), ("b", 0, 1)]
    assert first_differences(alone, alone) == []


@pytest.mark.parametrize("mesh", [None, pytest.param((2, 2, 2, 1), marks=pytest.mark.slow)])
def test_a_near_tie_is_told_from_a_wrong_token(own, mesh):
    target, answers = own
    low = int(np.argmin(logits_behind(target, PROMPTS[0], answers[0][:2])))
    twin = next(token for token in range(30, 60) if token not in {*answers[1], *answers[0], low})
    drafted = measured([parted(answers[0], 2, low), parted(answers[1], 3, twin), answers[2]])
    if mesh is not None:
        target = make("qwen3", mesh, tie_word_embeddings=False)
    session = session_of(twins(target, answers[1][3], twin))
    wrong, tie = differences(session, drafted, measured(answers))
    assert (wrong.question, wrong.position, wrong.own.token, wrong.drafted.token) == ("low", 2, answers[0][2], low)
    assert wrong.distance > 1000
    assert not wrong.is_near_tie
    assert (tie.question, tie.position, tie.own.token, tie.drafted.token) == ("tie", 3, answers[1][3], twin)
    assert tie.distance <= 2
    assert_close(tie.own.logit, tie.drafted.logit, ulp=2, dtype=np.float32)
    assert tie.is_near_tie
    for one in (wrong, tie):
        assert 0 < one.rounding < 100  # a few roundings of a small target
    logits = logits_behind(target, PROMPTS[0], answers[0][:2])
    unit = rounding_unit(float(logits.max()), jnp.float32)
    np.testing.assert_allclose(wrong.distance, (logits.max() - logits[low]) / unit, rtol=1e-4)


def logits_behind(target, prompt, answer):
    text = [*prompt, *answer]
    at = np.arange(len(text), dtype=np.int32)
    tokens, at = (np.tile(x, (target.row_multiple, 1)).astype(np.int32) for x in (text, at))
    _, out = target.extend(target.new_cache(target.row_multiple, 16), tokens, at, "all")
    return np.asarray(target.logits(out.last_BTE[:, -1]))[0]


def test_a_token_that_is_a_little_off_is_wrong(own):
    """A thousandth of a logit: thousands of units of float32."""
    target, answers = own
    twin = next(token for token in range(30, 60) if token not in answers[1])
    drafted = measured([answers[0], parted(answers[1], 3, twin), answers[2]])
    (found,) = differences(session_of(twins(target, answers[1][3], twin, 0.999)), drafted, measured(answers))
    assert 1000 < found.distance < 2e5
    assert not found.is_near_tie


def test_two_tokens_that_are_equally_unlikely_are_wrong(own):
    """What counts is how far the lower one lies below the token that should have been chosen."""
    target, answers = own
    low = int(np.argmin(logits_behind(target, PROMPTS[0], answers[0][:2])))
    twin = next(token for token in range(30, 60) if token not in {*answers[0], low})
    alone, drafted = ([parted(answers[0], 2, token), *answers[1:]] for token in (low, twin))
    (found,) = differences(session_of(twins(target, low, twin)), measured(drafted), measured(alone))
    assert found.distance > 1000
    assert not found.is_near_tie


@pytest.mark.parametrize(("distance", "rounding", "is_tie"), [
    (LIMIT - 0.1, 0.0, True), (LIMIT + 0.1, 0.0, False), (3 * LIMIT - 0.1, 3.0, True), (3 * LIMIT + 0.1, 3.0, False),
])  # fmt: skip
def test_a_near_tie_is_within_so_many_roundings_and_one_unit_at_least(distance, rounding, is_tie):
    one, other = Choice(1, "a", 2.0), Choice(2, "b", 1.0)
    assert Difference("q", 0, 0, one, other, distance, rounding).is_near_tie == is_tie


def test_an_answer_that_ends_early_is_wrong(own):
    target, answers = own
    (found,) = differences(session_of(target), measured([answers[0][:2], *answers[1:]]), measured(answers))
    assert (found.drafted, found.own.token, found.position) == (None, answers[0][2], 2)
    assert not found.is_near_tie
    result = {"name": "chain of 3", "decoded": {"differences": [found.to_json()]}}
    with pytest.raises(
        WrongAnswersError,
        match=r"of the answers with the draft 1 differ.*chain of 3, prompt 'low', turn 1, token 3: the end of the",
    ):
        refuse_wrong_answers([result])
    refuse_wrong_answers([{"name": "x", "decoded": {"differences": [found.to_json() | {"near_tie": True}]}}])
    refuse_wrong_answers([{"name": "sampled", "decoded": {}}])


@pytest.mark.parametrize(("size", "dtype", "unit"), [
    (20.0, jnp.bfloat16, 0.125), (16.0, jnp.bfloat16, 0.125), (15.9, jnp.bfloat16, 0.0625),
    (1.0, jnp.float32, 2.0**-23),
])  # fmt: skip
def test_units_are_those_of_the_precision(size, dtype, unit):
    assert rounding_unit(size, dtype) == unit
