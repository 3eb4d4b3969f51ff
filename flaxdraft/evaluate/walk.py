"""Accept length by walking answers as decoding would, from teacher-forced rows.

Accept length = (generated tokens - 1) / target passes, prefill excluded; 1.0 without a draft's help. The walk starts
at the row before the answer, takes what that row accepts plus the target's own token, and goes on from there. On the
target's own greedy answers this is exactly what greedy decoding does.

Shape letters: B batch, T time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from flaxdraft.data.documents import Answer, as_document
from flaxdraft.data.pipeline import collate
from flaxdraft.devices import host_reads
from flaxdraft.interfaces import Algorithm, Draw, Example, Sums
from flaxdraft.ops.padding import round_up

EVALUATION_ROWS = 32  # of one compiled evaluation batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """What is added up over answers and batches, before any ratio. Numpy, 64 bits wide."""

    sums: Sums
    passes: np.int64  # target passes of the walks
    gained: np.int64  # tokens that they gave


def combine(parts: Iterable[Part]) -> Part:
    """The sum; integers do not depend on how a set was cut into parts, floats only by rounding in 64 bits."""
    return functools.reduce(lambda one, other: jax.tree.map(np.add, one, other), parts)


@dataclasses.dataclass(frozen=True)
class TeacherForced:
    """One pass over held-out answers."""

    total: Part
    yields: list[list[int]]  # of each answer: the tokens that each target pass gave

    @property
    def accept_length(self) -> float:
        """Walked, pooled over all answers; 1.0 if no pass was needed at all."""
        return float(self.total.gained / self.total.passes) if self.total.passes else 1.0

    def figures(self) -> dict[str, float | list[float]]:
        """The loss, the walked accept length, and what the algorithm's sums show."""
        numerator, denominator = self.total.sums.terms()
        return {
            "loss": float(numerator / denominator), "accept_length": self.accept_length, **self.total.sums.figures()
        }  # fmt: skip


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
    teacher: Any,
    place: Callable[[Example], Example] = lambda host: host,
):
    """accepted(params) gives the per-batch call that `evaluate_teacher_forced` makes, compiled once.

    Args:
        place: a host's example on its devices.
    """

    @jax.jit
    def compiled(params, frozen, example):
        sums, accepted_BT = algorithm.accepted(nnx.merge(graphdef, params, frozen), example)
        if jax.sharding.get_abstract_mesh().empty:
            return sums, accepted_BT
        return sums, jax.reshard(accepted_BT, jax.P())  # every process walks all answers

    def accepted(params: nnx.State):
        return lambda host: compiled(params, frozen, dataclasses.replace(place(host), teacher=teacher))

    return accepted


def evaluate_teacher_forced(
    accepted: Callable[[Example], tuple[Sums, jax.Array]],
    rows: Sequence[Answer],
    algorithm: Algorithm,
    batch: int,
    multiple: int = 32,
) -> TeacherForced:
    """Sums over all rows first, ratios last: the batch size does not matter.

    Args:
        accepted: see `make_accepted`.
        rows: at least one answer.
        multiple: to which lengths are rounded up; each length compiles once.
    """
    parts, yields = [], []
    length = round_up(max(len(row.tokens) for row in rows), multiple)
    supervised = round_up(max(row.num_answer for row in rows), multiple)
    for at in range(0, len(rows), batch):
        chunk = rows[at : at + batch]
        one_a_row = ([as_document(row)] for row in chunk)
        host = collate(one_a_row, rows[0].features, batch, length, supervised, algorithm, Draw(0, 0, at))
        sums, accepted_BT = host_reads.read(accepted(host))
        walks = [walk(accepted_BT[i], row.num_prompt, row.num_answer) for i, row in enumerate(chunk)]
        wide = jax.tree.map(lambda x: x.astype(np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64), sums)
        parts.append(Part(wide, np.int64(sum(map(len, walks))), np.int64(sum(map(sum, walks)))))
        yields += walks
    return TeacherForced(combine(parts), yields)
