"""Speed of the quickstart's training step beside the same step in PyTorch, in one run.

    python experiments/bench_quickstart.py                     # the `parity` extra brings PyTorch
    python experiments/bench_quickstart.py draft.fields='{intermediate_size: 768}'

Model, initial weights and batches are those of experiments/quickstart.yaml: its data is made first if it is not there
(about five minutes). Both sides must give the same losses and gradients on a batch of each row length before anything
is timed; then they take turns, each step forward, backward, clipping and AdamW in float32 on all cores, and the median
over the pairs of how much faster ours is counts. On a machine that others use, one core and the process's own seconds
are steadier than the clock, which there punishes whoever waits for a thread:

    OMP_NUM_THREADS=1 taskset -c 0 python experiments/bench_quickstart.py --clock processor

PyTorch computes the draft layer at all rows, as its trainers do, and
at supervised rows alone, as flaxdraft does; eager and, with --compile, compiled.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from pytorch_draft import TorchBatch, TorchDraft, training_step

from flaxdraft.algorithms.eagle3.drafts import llama
from flaxdraft.algorithms.eagle3.objective import supervision
from flaxdraft.config import load_config
from flaxdraft.data.pipeline import make_pipeline
from flaxdraft.devices.weight_places import on_mesh, weight_on_mesh
from flaxdraft.files.name_tables import state_to_torch
from flaxdraft.interfaces import Example
from flaxdraft.nn.precision import DTYPES, Precision
from flaxdraft.run.answers import answer_prompts
from flaxdraft.run.draft import draft_config, make_draft
from flaxdraft.run.material import Material, gather
from flaxdraft.run.setup import Setup, claim_folders, prepare
from flaxdraft.run.target import RunTarget
from flaxdraft.train.batch_placement import SHARDING, training_example
from flaxdraft.train.optimizer import optimizer, schedule
from flaxdraft.train.state import init_state, split_draft
from flaxdraft.train.step import make_train_step

QUICKSTART = Path(__file__).parent / "quickstart.yaml"
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


class Run(NamedTuple):
    """The quickstart up to its training."""

    setup: Setup
    material: Material

    @property
    def draft_config(self) -> Any:
        return draft_config(self.setup, self.material.target)

    def teacher(self, dtype: str) -> Any:
        return self.setup.algorithm.teacher(self.material.embedding_and_head, self.material.vocab, DTYPES[dtype])


def batch_of_each_length(run: Run) -> dict[int, Example]:
    """The first batch of each row length, in the order of training."""
    config = run.setup.config
    pipeline = make_pipeline(run.material.documents, run.setup.algorithm, config.train, config.data, config.seed)
    found: dict[int, Example] = {}
    for step in range(pipeline.steps_per_epoch):
        host = pipeline.batch(step)
        if host.batch.segments_BT[:, 0].all():  # none of its rows is filling
            found.setdefault(host.batch.tokens_BT.shape[1], host)
    return dict(sorted(found.items()))


class Ours:
    """flaxdraft's step as the trainer runs it."""

    def __init__(self, run: Run):
        self.run, config, material = run, run.setup.config, run.material
        head = run.teacher(config.train.compute_dtype)
        self.graphdef, params, frozen = split_draft(
            make_draft(run.setup, material.target, material.embedding_and_head, material.vocab, SHARDING, Precision())
        )
        self.tx = optimizer(config.train)
        with jax.set_mesh(run.setup.mesh):
            self.head_WE = weight_on_mesh("teacher head", head, run.setup.mesh, SHARDING.weight_ve)
            self.params, self.frozen = (on_mesh(state, run.setup.mesh, SHARDING) for state in (params, frozen))
        self.weights = state_to_torch(params, llama.name_table(run.draft_config), np.float32)

    def example(self, host: Example):
        return training_example(host, self.run.setup.mesh, self.run.setup.algorithm, self.head_WE)

    def gradients(self, host: Example) -> tuple[float, dict[str, np.ndarray]]:
        """Loss and gradients, by the servers' names."""
        algorithm = self.run.setup.algorithm

        def loss(params, frozen, example):
            draft = nnx.merge(self.graphdef, params, frozen)
            numerator, count = algorithm.sums(draft, example, algorithm.first_carry()).terms()
            return numerator / count

        with jax.set_mesh(self.run.setup.mesh):
            value, gradients = jax.jit(jax.value_and_grad(loss))(self.params, self.frozen, self.example(host))
        return float(value), state_to_torch(gradients, llama.name_table(self.run.draft_config), np.float32)

    def step(self, host: Example) -> Callable[[], float]:
        """One optimizer step a call; returns its loss."""
        with jax.set_mesh(self.run.setup.mesh):
            state = jax.jit(lambda p: init_state(jax.tree.map(jnp.copy, p), self.tx, self.run.setup.algorithm))(
                self.params
            )
            example = self.example(host)
        step = make_train_step(
            self.graphdef, self.run.setup.algorithm, self.tx, DTYPES[self.run.setup.config.train.compute_dtype]
        )

        def call() -> float:
            nonlocal state
            with jax.set_mesh(self.run.setup.mesh):
                state, metrics = step(state, self.frozen, example)
            return float(metrics.loss)

        return call


class Theirs:
    """The same in PyTorch."""

    def __init__(self, run: Run, weights: dict[str, np.ndarray], *, every_row: bool, compiled: bool):
        self.run, self.weights, self.every_row, self.compiled = run, weights, every_row, compiled

    def draft(self) -> TorchDraft:
        run = self.run
        embedding, head = (
            torch.from_numpy(np.array(x)) for x in (run.material.embedding_and_head.embedding(), run.teacher("float32"))
        )
        draft = TorchDraft(run.draft_config, embedding, head, run.setup.algorithm.step_weights)
        draft.load_state_dict({name: torch.from_numpy(x.copy()) for name, x in self.weights.items()})
        return draft

    def batch(self, host: Example) -> TorchBatch:
        """Masks become lists of rows here: a step differentiates nothing but what its loss reads."""
        batch, features, num_steps = host.batch, host.features, self.run.setup.algorithm.settings.ttt_length
        draft_ids_V, length = self.run.material.vocab.to_draft(), batch.tokens_BT.shape[1]
        supervised_JBT = supervision(batch.assistant_BT, batch.segments_BT, num_steps)
        shape = batch.tokens_BT.shape
        # The teacher of row p at step j is the target's distribution at p + 1 + j.
        known = np.zeros(shape, bool)
        at_J, teacher_at_J, argmax_J = [], [], []
        for j, supervised_BT in enumerate(supervised_JBT):
            b, p = np.nonzero(supervised_BT)
            argmax = draft_ids_V[features.argmax_BT[b, p + 1 + j]]
            b, p, argmax = b[argmax >= 0], p[argmax >= 0], argmax[argmax >= 0]
            known[b, p + 1 + j] = True
            teacher_at_J.append((b, p + 1 + j))
            argmax_J.append(torch.from_numpy(argmax).long())
            at_J.append((b, p))
        number_BT = np.cumsum(known).reshape(shape) - 1
        rows_BR = None
        if not self.every_row:
            rows_BR = np.minimum(host.chosen.rows_BR, length - 1)
            place_BT = np.zeros(shape, int)
            for row, listed in zip(place_BT, host.chosen.rows_BR, strict=True):
                inside = listed[listed < length]
                row[inside] = np.arange(len(inside))
            at_J = [(b, place_BT[b, p]) for b, p in at_J]
        width = length if rows_BR is None else rows_BR.shape[1]
        tokens_BT = np.pad(batch.tokens_BT, ((0, 0), (0, num_steps)))
        wide = lambda x: torch.from_numpy(np.asarray(x, np.float32))  # noqa: E731
        return TorchBatch(
            torch.from_numpy(tokens_BT).long(), wide(features.taps_BTKE).flatten(2), wide(features.last_BTE[known]),
            None if rows_BR is None else torch.from_numpy(rows_BR).long(),
            [torch.from_numpy(b * width + p) for b, p in at_J],
            [torch.from_numpy(number_BT[at]) for at in teacher_at_J], argmax_J,
        )  # fmt: skip

    def gradients(self, host: Example) -> tuple[float, dict[str, np.ndarray]]:
        draft = self.draft()
        loss, _ = draft(self.batch(host))
        loss.backward()
        return loss.item(), {name: parameter.grad.numpy() for name, parameter in draft.named_parameters()}

    def step(self, host: Example) -> Callable[[], float]:
        draft, batch, train = self.draft(), self.batch(host), self.run.setup.config.train
        forward = torch.compile(draft) if self.compiled else draft
        matrices = [p for p in draft.parameters() if p.ndim > 1]
        vectors = [p for p in draft.parameters() if p.ndim == 1]
        groups = [
            {"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0},
        ]  # fmt: skip
        adamw = torch.optim.AdamW(groups, 1.0, tuple(train.betas), train.eps, fused=True)
        rate = torch.optim.lr_scheduler.LambdaLR(adamw, schedule_of(train))
        return lambda: float(training_step(draft, forward, adamw, rate, train.clip_norm, batch))


def schedule_of(train) -> Callable[[int], float]:
    """The learning rate of each step as plain numbers, so that no JAX runs in PyTorch's turn."""
    rates = np.asarray(jax.vmap(schedule(train))(jnp.arange(train.num_steps + 1)))
    return lambda step: float(rates[min(step, train.num_steps)])


def check(ours: Ours, theirs: Theirs, host: Example) -> tuple[float, float]:
    """Relative difference of the losses, and the largest one of a gradient (of its norm)."""
    (loss, gradients), (wanted, wanted_gradients) = ours.gradients(host), theirs.gradients(host)
    assert gradients.keys() == wanted_gradients.keys()
    off = np.max([np.linalg.norm(gradients[n] - g) / np.linalg.norm(g) for n, g in wanted_gradients.items()])
    off_loss = abs(loss - wanted) / abs(wanted)
    if not (off_loss <= LOSS_TOLERANCE and off <= GRADIENT_TOLERANCE):  # NaN does not pass
        raise SystemExit(f"losses differ by {off_loss:.1e}, gradients by {off:.1e}; nothing is timed")
    return off_loss, float(off)


def turns(
    sides: list[Callable[[], float]], repeats: int, clock: Callable[[], float]
) -> Iterator[tuple[list[float], list[float]]]:
    """Seconds and losses of each side, turn after turn; the machine drifts by more than they differ."""
    for call in sides:
        for _ in range(3):  # compilation; the rate is 0 at the first step
            call()
    for _ in range(repeats):
        seconds, losses = [], []
        for call in sides:
            start = clock()
            losses.append(call())
            seconds.append(clock() - start)
        yield seconds, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--compile", action="store_true", help="torch.compile too; it needs a C++ compiler")
    parser.add_argument("overrides", nargs="*", metavar="SECTION.FIELD=VALUE")
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    setup = prepare(load_config(str(QUICKSTART), arguments.overrides))
    claim_folders(setup)
    target = RunTarget(setup)
    run = Run(setup, gather(setup, target, answer_prompts(setup, target)))
    ours = Ours(run)
    names, others = [], []
    for compiled in (False, True) if arguments.compile else (False,):
        for every_row in (True, False):
            names.append(f"{'compiled' if compiled else 'eager'}, {'all' if every_row else 'supervised'} rows")
            others.append(Theirs(run, ours.weights, every_row=every_row, compiled=compiled))
    print(f"jax {jax.__version__}, torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores, float32")
    table = ["| batch | side | ms a step | tokens/s | flaxdraft's speed beside it |", "|---|---|---|---|---|"]
    for length, host in batch_of_each_length(run).items():
        off = [check(ours, theirs, host) for theirs in others]
        print(
            f"rows of {length}: losses agree to {max(x for x, _ in off):.1e}, gradients to {max(x for _, x in off):.1e}"
        )
        calls = [side.step(host) for side in (ours, *others)]
        seconds, losses = zip(*turns(calls, arguments.repeats, CLOCKS[arguments.clock]), strict=True)
        print(f"  after {arguments.repeats + 3} steps the losses are " + ", ".join(f"{x:.5f}" for x in losses[-1]))
        seconds, num_tokens = np.array(seconds), int((host.batch.segments_BT > 0).sum())
        medians, ratios = np.median(seconds, axis=0), np.median(seconds / seconds[:, :1], axis=0)
        shape = f"{len(host.chosen.rows_BR)} x {length}, {int((host.chosen.rows_BR < length).sum())} supervised"
        for name, median, ratio in zip(["flaxdraft", *names], medians, ratios, strict=True):
            side, times = (name, "") if name == "flaxdraft" else (f"PyTorch, {name}", f"{ratio:.2f} x")
            table.append(f"| {shape} | {side} | {median * 1e3:.0f} | {num_tokens / median:,.0f} | {times} |")
    print("\n".join(table))


if __name__ == "__main__":
    main()
