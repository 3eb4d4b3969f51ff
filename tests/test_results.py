"""What is said of decoded answers beside the target's own, and how it is written down; nothing is computed."""

import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pytest

from flaxdraft.decode.decoding import Decoded
from flaxdraft.errors import InputError
from flaxdraft.evaluate.differences import Choice, Difference
from flaxdraft.evaluate.measure import Guess, Measured, Timing, Turn
from flaxdraft.evaluate.report import Sample, write_report
from flaxdraft.evaluate.results import guess_result, sample_of
from flaxdraft.evaluate.walk import Part, TeacherForced

YIELDS = [[3, 1], [2, 2]]


@dataclasses.dataclass(frozen=True)
class Sums:
    """An algorithm's own figures, of names that nobody else knows."""

    def terms(self):
        return np.float64(3.0), np.float64(2.0)

    def figures(self):
        return {"accuracy": [0.5, 0.25], "odd_number": 7.0}


def measured(guess, tokens, yields, seconds):
    turns = [
        Turn(id, 0, [1, 2, 3], Decoded(answer, gained))
        for id, answer, gained in zip("ab", tokens, yields, strict=True)
    ]  # fmt: skip
    return Measured(guess, 0, turns, Timing(1.0, seconds, 8))


@pytest.fixture(scope="module")
def result():
    """The second answer ends otherwise than the target's own."""
    own = [[3, 4, 5, 6, 7], [3, 4, 5, 6, 7]]
    alone = measured(Guess(), own, [[1] * 4] * 2, 4.0)
    drafted = measured(Guess(2), [own[0], [3, 4, 5, 6, 9]], YIELDS, 2.0)
    forced = TeacherForced(Part(Sums(), np.int64(4), np.int64(8)), [YIELDS[0], [1, 3]])
    parted = Difference("b", 0, 4, Choice(7, "|x", 2.0), Choice(9, "y", 1.5), 40.0, 2.0)
    return guess_result([drafted], [alone], {"a": "odd", "b": "even"}, forced, [parted])


def test_only_answers_that_are_the_target_s_own_are_called_identical(result):
    assert result["decoded"]["identical_answers"] == 1
    assert [one["near_tie"] for one in result["decoded"]["differences"]] == [False]
    assert (result["answers"], result["generated_tokens"], result["decoded"]["target_passes_alone"]) == (2, 10, 8)
    assert result["decoded"]["accept_length"] == result["teacher_forced"]["accept_length"] == 2.0
    assert result["teacher_forced"]["answers_with_the_decoded_passes"] == 1
    assert result["decoded"]["accept_length_by_category"] == {"even": 2.0, "odd": 2.0}
    assert (result["with_draft"]["tokens_per_second"], result["speedup"]) == (4.0, 2.0)


def test_answers_of_one_token_measure_nothing():
    one = measured(Guess(), [[3], [3]], [[], []], 1.0)
    with pytest.raises(InputError, match="every answer ends with its first token"):
        guess_result([one], [one], {"a": "odd", "b": "even"}, None, [])


def test_a_report_has_what_there_are_figures_for(result, tmp_path):
    """An algorithm's figures under their own names; pictures of training and of an answer where they are given."""
    sampled = result | {"name": "sampled", "decoded": result["decoded"] | {"accept_length": 1.25}}
    del sampled["teacher_forced"]
    metrics = [
        {"kind": "train", "step": 1, "loss": 2.0},
        *({"kind": "held_out", "step": step, "loss": 1.5, "accept_length": 1.2, "accuracy": [0.5]} for step in (0, 2)),
    ]  # fmt: skip
    write_report(tmp_path / "one", {"target": "T"}, [result], metrics, Sample("why?", [*"abcde"], YIELDS[0]))
    write_report(tmp_path / "two", {"target": "T"}, [result, sampled])
    pictures = {
        "one": {"sample", "accepted_lengths", "acceptance", "accept_length", "accuracy", "loss"},
        "two": {"accepted_lengths", "acceptance", "chains"},
    }  # fmt: skip
    for name, drawn in pictures.items():
        text = (tmp_path / name / "report.md").read_text()
        assert (
            set(re.findall(r"!\[\]\((\w+)\.png\)", text)) == drawn == {p.stem for p in (tmp_path / name).glob("*.png")}
        )
        assert "- target: T" in text
    one, two = ((tmp_path / name / "report.md").read_text().splitlines() for name in pictures)
    assert {"| odd number | 7.000 |", "| top-1 accuracy, chain of 2 | 0.500 | 0.250 |"} <= {*one}
    assert {
        "|  | chain of 2 | sampled |",
        "| odd number | 7.000 |  |",
        "| accept length, real decoding | 2.000 | 1.250 |",
    } <= {*two}
    assert r"| chain of 2 | b, turn 1 | 5 | `'\|x'` (2.0000) | `'y'` (1.5000) | 40.0 | 2.0 | **wrong** |" in one
    assert any("chain of 2: 2.00 times as fast as the target alone" in line for line in one)


def test_the_sample_is_the_answer_that_saved_most_passes():
    """Not the longest one."""
    run = measured(Guess(3), [[1] * 8, [2] * 7], [[1] * 7, [3, 3]], 1.0)
    session = SimpleNamespace(tokenizer=SimpleNamespace(decode=str))
    assert sample_of(session, run) == {"id": "b", "pieces": ["[2]"] * 7, "yields": [3, 3]}
