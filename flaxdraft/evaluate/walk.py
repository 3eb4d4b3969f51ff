"""Accept length by walking answers as decoding would, from teacher-forced rows.

Accept length = (generated tokens - 1) / target passes, prefill excluded; 1.0 without a draft's help. The walk starts
at the row before the answer, takes what that row accepts plus the target's own token, and goes on from there. On the
target's own greedy answers this is exactly what greedy decoding does.

Shape letters: B batch, T time, J steps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from flax import nnx

from flaxdraft.data.documents import as_document
from flaxdraft.data.pipeline import HostBatch, collate
from flaxdraft.decode.greedy import Row, round_up
from flaxdraft.devices import host_reads
from flaxdraft.interfaces import Algorithm, Example, LossSums

EVALUATION_ROWS = 32  # of one compiled evaluation batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """What is added up over answers, batches and hosts, before any ratio. Numpy, 64 bits wide."""

    sums: LossSums
    passes: np.ndarray  # int: target passes of the walks
    gained: np.ndarray  # int: tokens that they gave

    @classmethod
    def empty(cls, num_steps: int) -> Part:
        zero_J, none_J, none = np.zeros(num_steps), np.zeros(num_steps, np.int64), np.zeros((), np.int64)
        return cls(LossSums(zero_J, none_J, none_J, none_J, none_J, zero_J), none, none)


def combine(parts: Iterable[Part]) -> Part:
    """The sum; integers do not depend on how a set was cut into parts, floats only by rounding in 64 bits."""
    return functools.reduce(lambda one, other: jax.tree.map(np.add, one, other), parts)


@dataclasses.dataclass(frozen=True)
class TeacherForced:
    """One pass over held-out answers."""

    total: Part
    mean_loss: float
    yields: list[list[int]]  # of this host's answers: the tokens that each target pass gave

    @property
    def sums(self) -> LossSums:
        return self.total.sums

    @property
    def accept_length(self) -> float:
        """Walked, pooled over all answers; 1.0 if no pass was needed at all."""
        return float(self.total.gained / self.total.passes) if self.total.passes else 1.0

    def accuracy(self) -> np.ndarray:
        """float [J]: share of supervised rows whose top-1 is the target's."""
        return self.sums.hit_J / np.maximum(self.sums.row_count_J, 1)

    def mean_over_rows(self) -> float:
        """1 + the joint-prefix rates, over all rows: larger than the walk, since decoding visits hard places more."""
        return float(1 + np.sum(self.sums.prefix_hit_J / np.maximum(self.sums.row_count_J, 1)))

    def product_of_marginals(self) -> float:
        """What reference trainers call the simulated accept length: the sum over chain lengths of products of the
        positions' accuracies, each taken over all rows; no token of the target's own is counted. To compare with
        their figures alone: hits follow hits, so it is no accept length."""
        return float(np.sum(np.cumprod(self.accuracy())))

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
        sums, accepted_BT = algorithm.accepted(nnx.merge(graphdef, params, frozen), example)
        if jax.sharding.get_abstract_mesh().empty:
            return sums, accepted_BT
        return sums, jax.reshard(accepted_BT, jax.P())  # every process walks all answers

    def accepted(params: nnx.State):
        def call(host: HostBatch):
            return compiled(params, frozen, Example(*place(host), teacher_head_WE))

        return call

    return accepted


def evaluate_part(
    accepted: Callable[[HostBatch], tuple[LossSums, jax.Array]],
    rows: Sequence[Row],
    algorithm: Algorithm,
    batch: int,
    multiple: int = 32,
) -> tuple[Part, list[list[int]]]:
    """The sums over some answers, which may be none, and the walk of each.

    Args:
        multiple: to which lengths are rounded up; each length compiles once.
    """
    total, yields = Part.empty(algorithm.num_steps), []
    if not rows:
        return total, yields
    length = round_up(max(len(row.tokens) for row in rows), multiple)
    supervised = round_up(max(row.num_answer for row in rows), multiple)
    for at in range(0, len(rows), batch):
        chunk = rows[at : at + batch]
        one_a_row = ([as_document(row)] for row in chunk)
        host = collate(one_a_row, rows[0].features, batch, length, supervised, algorithm)
        sums, accepted_BT = host_reads.read(accepted(host))
        walks = [walk(accepted_BT[i], row.num_prompt, row.num_answer) for i, row in enumerate(chunk)]
        wide = jax.tree.map(lambda x: x.astype(np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64), sums)
        passes, gained = np.int64(sum(map(len, walks))), np.int64(sum(map(sum, walks)))
        total, yields = combine([total, Part(wide, passes, gained)]), yields + walks
    return total, yields


def evaluate_teacher_forced(
    accepted: Callable[[HostBatch], tuple[LossSums, jax.Array]],
    rows: Sequence[Row],
    algorithm: Algorithm,
    batch: int,
    gather: Callable[[Part], Sequence[Part]] = lambda part: [part],
) -> TeacherForced:
    """Sums over all rows of all hosts first, ratios last: neither batch size nor the number of hosts matters.

    Args:
        accepted: see `make_accepted`.
        rows: this host's answers; none are fine where another host has some.
        gather: brings all hosts' parts to every host, see `hosts.gather_parts`; this host is alone by default.
    """
    part, yields = evaluate_part(accepted, rows, algorithm, batch)
    total = combine(gather(part))
    return TeacherForced(total, float(algorithm.mean_loss(total.sums)), yields)
