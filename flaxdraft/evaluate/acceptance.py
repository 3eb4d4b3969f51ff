"""Accept length by walking answers as decoding would, from teacher-forced rows.

Accept length = (generated tokens - 1) / target passes, prefill excluded; 1.0 without a draft's help. The walk starts
at the row before the answer, takes what that row accepts plus the target's own token, and goes on from there. On the
target's own greedy answers this is exactly what greedy decoding does.

Shape letters: B batch, T time, J steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx

from flaxdraft import reads
from flaxdraft.data.documents import as_document
from flaxdraft.data.generation import Row, round_up
from flaxdraft.data.pipeline import HostBatch, collate
from flaxdraft.interfaces import Algorithm, Example, LossSums

EVALUATION_ROWS = 32  # of one compiled evaluation batch


@dataclasses.dataclass(frozen=True)
class TeacherForced:
    """One pass over held-out answers. `yields[i]` are the tokens that each target pass gave for answer i."""

    sums: LossSums  # numpy leaves
    mean_loss: float
    yields: list[list[int]]

    @property
    def accept_length(self) -> float:
        return accept_length(self.yields)

    def accuracy(self) -> np.ndarray:
        """float [J]: share of supervised rows whose top-1 is the target's."""
        return self.sums.hit_J / np.maximum(self.sums.row_count_J, 1)

    def mean_over_rows(self) -> float:
        """1 + the joint-prefix rates, over all rows: larger than the walk, since decoding visits hard places more."""
        return float(1 + np.sum(self.sums.prefix_hit_J / np.maximum(self.sums.row_count_J, 1)))

    def expected_accept(self) -> np.ndarray:
        """float [J]: mean of sum_w min(p, q)."""
        return self.sums.expected_accept_J / np.maximum(self.sums.row_count_J, 1)


def walk(accepted_T: Sequence[int], num_prompt: int, num_answer: int) -> list[int]:
    """Tokens that each target pass yields for one answer; they sum to num_answer - 1 (prefill gave the first)."""
    row, left, yields = num_prompt - 1, num_answer - 1, []
    while left > 0:
        gained = min(int(accepted_T[row]) + 1, left)
        yields.append(gained)
        row, left = row + gained, left - gained
    return yields


def accept_length(yields: Sequence[Sequence[int]]) -> float:
    """Pooled over all answers; 1.0 if no pass was needed at all."""
    passes = sum(map(len, yields))
    return sum(map(sum, yields)) / passes if passes else 1.0


def histogram(yields: Sequence[Sequence[int]], chain_length: int) -> np.ndarray:
    """int [chain_length + 1]: passes by the number of draft tokens that were accepted and used."""
    return np.bincount([y - 1 for one in yields for y in one], minlength=chain_length + 1)


def make_accepted(
    graphdef: nnx.GraphDef,
    algorithm: Algorithm,
    frozen: nnx.State,
    teacher_head_WE: jax.Array,
    place: Callable[[HostBatch], tuple] = lambda host: (host.batch, host.features, host.rows_BR),
):
    """accepted(params) gives the per-batch call that `evaluate_teacher_forced` makes, compiled once.

    Args:
        place: batch, features and rows of a host batch on their devices.
    """

    @jax.jit
    def compiled(params, frozen, example):
        return algorithm.accepted(nnx.merge(graphdef, params, frozen), example)

    def accepted(params: nnx.State):
        def call(host: HostBatch):
            return compiled(params, frozen, Example(*place(host), teacher_head_WE))

        return call

    return accepted


def evaluate_teacher_forced(
    accepted: Callable[[HostBatch], tuple[LossSums, jax.Array]], rows: Sequence[Row], algorithm: Algorithm, batch: int
) -> TeacherForced:
    """Sums over all rows first, ratios last, so that the batch size does not matter.

    Args:
        accepted: see `make_accepted`.
    """
    length = round_up(max(len(row.tokens) for row in rows), 32)
    supervised = round_up(max(row.num_answer for row in rows), 32)
    total, yields = None, []
    for at in range(0, len(rows), batch):
        chunk = rows[at : at + batch]
        one_a_row = ([as_document(row)] for row in chunk)
        host = collate(one_a_row, rows[0].features, batch, length, supervised, algorithm)
        sums, accepted_BT = reads.read(accepted(host))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
        yields += [walk(accepted_BT[i], row.num_prompt, row.num_answer) for i, row in enumerate(chunk)]
    return TeacherForced(total, float(algorithm.mean_loss(total)), yields)
