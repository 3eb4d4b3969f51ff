"""The training loop: the one place of training that reads a clock, logs, evaluates and saves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from flaxdraft.config import TrainConfig
from flaxdraft.data.online import one_ahead
from flaxdraft.data.pipeline import Pipeline, batches_from
from flaxdraft.devices import host_reads
from flaxdraft.devices.sharding import known
from flaxdraft.interfaces import Algorithm, Example, Target, VocabMap
from flaxdraft.nn.precision import DTYPES
from flaxdraft.progress import CONSOLE, bar
from flaxdraft.stages import provenance
from flaxdraft.train import token_counter as counting
from flaxdraft.train.batch_placement import SHARDING, placed_rows, training_example
from flaxdraft.train.checkpoint import Checkpoints, abstract_like
from flaxdraft.train.guards import BrokenSteps, PreemptedError, Preemption, memory_advice
from flaxdraft.train.meters import Meters
from flaxdraft.train.metrics_log import MetricsLog
from flaxdraft.train.optimizer import optimizer
from flaxdraft.train.profiling import Trace
from flaxdraft.train.resident import Resident
from flaxdraft.train.resume import Resume, begin
from flaxdraft.train.state import SCHEMA, TrainState, evaluation_params, init_state
from flaxdraft.train.step import make_train_step

# (parameters) -> {"loss", "accept_length", and what the algorithm shows}. Where some prompts were decoded,
# `accept_length_decoded` is among them, and is the score of a checkpoint.
HeldOut = Callable[[nnx.State], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Everything that stays the same from step to step."""

    directory: Path
    config: TrainConfig
    algorithm: Algorithm
    mesh: jax.sharding.Mesh
    vocab: VocabMap
    teacher: Any  # see `Algorithm.teacher`; on the mesh
    resume: Resume
    prefetch: int  # batches that are read ahead
    target: Target | None = None  # reads batches that come without features; on the same devices
    held: Target | None = None  # is on the devices while the draft trains, whoever asks it

    def example(self, host: Example) -> Example:
        """A batch on the devices, with the features that it brings or those that the target is asked for here."""
        if host.features is not None:
            return training_example(host, self.mesh, self.algorithm, self.teacher)
        batch, chosen = placed_rows((host.batch, host.chosen), self.mesh)
        assert self.target is not None, "batches without features"
        assert self.target.mesh is not None, "devices of the batch"
        place = jax.NamedSharding(self.target.mesh, known(SHARDING.act_b))
        features = jax.device_put(self.target.features(jax.device_put(batch, place)), batch.tokens_BT.sharding)
        return Example(batch, features, chosen, self.teacher)

    def record(self, score: float | None) -> dict[str, Any]:
        """What a checkpoint says of itself."""
        return {
            "schema": SCHEMA, "score": score, "measure": self.resume.measure, "inputs": self.resume.inputs,
            "origin": self.resume.origin,
            "vocab": {"size": self.vocab.draft_vocab_size, "source": self.vocab.source},
            "versions": provenance.versions(), "git": provenance.git_revision(),
            "topology": provenance.topology(self.mesh),
        }  # fmt: skip

    def train(
        self, graphdef: nnx.GraphDef, params: nnx.State, frozen: nnx.State, pipeline: Pipeline, evaluate: HeldOut
    ) -> nnx.State:
        """Trains to config.num_steps, from where `train.resume` says; returns `evaluation_params`.

        Args:
            evaluate: the figures of the held-out answers with given parameters.

        Raises:
            PreemptedError: the run was asked to stop; its state is saved.
            InputError: a checkpoint cannot be written or read, the data cannot be read, too many steps in a row were
                not finite, or the device has too little memory.
        """
        config, tx, algorithm = self.config, optimizer(self.config), self.algorithm
        make_state = jax.jit(lambda params: init_state(params, tx, algorithm, ema=config.ema_decay is not None))
        arrays, start = {"state": make_state(params), "counters": counting.zero(self.mesh)}, 0
        with Checkpoints(
            self.directory / "checkpoints", keep_latest=config.keep_latest, keep_every=config.keep_every
        ) as checkpoints:
            begun = begin(checkpoints, self.resume, abstract_like(arrays))
            if begun is not None:
                arrays, start = begun.arrays, begun.record["step"]
                CONSOLE.print(f"  resuming at step {start}")
            resident, state = Resident(), arrays["state"]
            resident.note(
                target=self.held, draft=(state.params, frozen, self.teacher), moments=(state.opt_state, state.ema)
            )
            with MetricsLog(self.directory, start, config.wandb) as log, memory_advice(self.directory, resident):
                if start == 0:
                    _evaluated(log, 0, evaluate(evaluation_params(arrays["state"])))
                compute = DTYPES[config.compute_dtype]
                train_step = make_train_step(graphdef, algorithm, tx, compute, config.accumulate, config.ema_decay)
                run = _Run(self, train_step, evaluate, checkpoints, log, pipeline, resident)
                return evaluation_params(run.steps(graphdef, frozen, arrays, start))


def _evaluated(log: MetricsLog, step: int, figures: dict[str, Any]) -> float:
    """Writes held-out figures; returns the score by which the best checkpoint is chosen."""
    log.write(step, "held_out", figures)
    decoded = figures.get("accept_length_decoded")
    CONSOLE.print(
        f"  step {step}: held-out accept length {figures['accept_length']:.3f}"
        + ("" if decoded is None else f" (decoded {decoded:.3f})")
        + f", loss {figures['loss']:.3f}, accuracy {' '.join(f'{a:.2f}' for a in figures['accuracy'])}"
    )
    return figures["accept_length"] if decoded is None else decoded


@dataclasses.dataclass(frozen=True)
class _Run:
    """The steps from where a run begins to its end."""

    trainer: Trainer
    train_step: Callable
    evaluate: HeldOut
    checkpoints: Checkpoints
    log: MetricsLog
    pipeline: Pipeline
    resident: Resident

    def steps(self, graphdef: nnx.GraphDef, frozen: nnx.State, arrays: Mapping[str, Any], start: int) -> TrainState:
        trainer, config = self.trainer, self.trainer.config
        state, counters = arrays["state"], arrays["counters"]
        tokens = counting.tokens(host_reads.read(counters))
        trace = Trace(config.profile, trainer.directory / "profile")
        batches = batches_from(self.pipeline, start, config.num_steps, trainer.prefetch)
        with bar("train", config.num_steps, start) as progress, Preemption() as preemption, host_reads.only_counted():
            meters = Meters(self.log, progress, BrokenSteps(config.max_skipped), self.pipeline, tokens)
            examples = one_ahead(meters.waiting(batches), trainer.example)
            for step, example in enumerate(examples, start):
                if step == start:
                    self.resident.note(batch=dataclasses.replace(example, teacher=None))
                    draft = nnx.merge(graphdef, state.params, frozen)
                    CONSOLE.print(f"  {trainer.algorithm.describe(draft, example)}")
                trace.before(step + 1)
                state, metrics = self.train_step(state, frozen, example)
                counters = counting.advanced(counters, example.batch.segments_BT)
                meters.note(step, metrics)
                trace.after(step + 1, metrics.loss)
                last = step + 1 == config.num_steps
                if (step + 1) % config.log_every == 0 or last:
                    meters.log(counters)
                stopping = preemption.due(step + 1)
                self._evaluate_and_save(step + 1, {"state": state, "counters": counters}, meters, last or stopping)
                if stopping and not last:
                    raise PreemptedError(
                        f"asked to stop: step {step + 1} of {config.num_steps} is saved; the same command goes on there"
                    )
            trace.close()
        return state

    def _evaluate_and_save(self, done: int, arrays: Mapping[str, Any], meters: Meters, force: bool) -> None:
        config, score = self.trainer.config, None
        if done % config.eval_every == 0 or done == config.num_steps:
            with meters.paused(arrays), host_reads.allowed():
                score = _evaluated(self.log, done, self.evaluate(evaluation_params(arrays["state"])))
        is_best = score is not None and score > self.checkpoints.best_score(self.trainer.resume.measure)
        self.checkpoints.poll()
        if done % config.checkpoint_every == 0 or is_best or force:
            with meters.paused(arrays), host_reads.allowed():
                self.checkpoints.save(done, arrays, self.trainer.vocab, self.trainer.record(score))
                if force:
                    self.checkpoints.finish()
