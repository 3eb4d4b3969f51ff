"""What is said of decoded held-out answers beside the stored ones."""

import dataclasses

import numpy as np

from flaxdraft.decode.decoding import Decoded
from flaxdraft.decode.greedy import Row
from flaxdraft.evaluate.held_out import summary
from flaxdraft.evaluate.walk import Part, TeacherForced

YIELDS = [[3, 1], [2, 2]]


def test_only_answers_that_are_the_target_s_own_are_called_identical():
    """The second one ends otherwise."""
    rows = [Row(np.arange(8, dtype=np.int32), 3, None)] * 2
    decoded = [Decoded([3, 4, 5, 6, 7], YIELDS[0]), Decoded([3, 4, 5, 6, 9], YIELDS[1])]
    total = dataclasses.replace(Part.empty(3), passes=np.int64(4), gained=np.int64(8))
    found = summary(rows, ["odd", "even"], TeacherForced(total, 0.5, [YIELDS[0], [1, 3]]), decoded, 3)
    assert found["decoded"]["identical_answers"] == 1
    assert (found["answers"], found["generated_tokens"], found["decoded"]["target_passes_alone"]) == (2, 10, 8)
    assert found["decoded"]["accept_length"] == 2.0
    assert found["teacher_forced"]["answers_with_the_decoded_passes"] == 1
