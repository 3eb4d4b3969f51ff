"""The training loop: the one place of training that reads a clock, logs, evaluates and saves."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from flaxdraft.checkpoint import Checkpoints, abstract_like
from flaxdraft.config import TrainConfig
from flaxdraft.data.generation import Row, round_up
from flaxdraft.data.online import one_ahead
from flaxdraft.data.pipeline import Batches, HostBatch, batches_from
from flaxdraft.errors import InputError
from flaxdraft.evaluate.acceptance import EVALUATION_ROWS, TeacherForced, evaluate_teacher_forced, make_accepted
from flaxdraft.interfaces import Algorithm, Example, Target, VocabMap
from flaxdraft.mesh import BATCH_AXIS
from flaxdraft.progress import CONSOLE, bar
from flaxdraft.train.optimizer import optimizer
from flaxdraft.train.state import TrainState, init_state
from flaxdraft.train.step import StepMetrics, make_train_step


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Everything that stays the same from step to step."""

    directory: Path
    config: TrainConfig
    algorithm: Algorithm  # of training
    evaluation: Algorithm  # with as many steps as drafts are long
    mesh: jax.sharding.Mesh
    vocab: VocabMap
    teacher_head_WE: jax.Array
    prefetch: int  # batches that are read ahead
    target: Target | None = None  # reads batches that come without features; on the training mesh

    @property
    def rows(self) -> jax.NamedSharding:
        """Rows split over the data axis."""
        return jax.NamedSharding(self.mesh, jax.P(BATCH_AXIS))

    def place(self, tree: Any) -> Any:
        """Host arrays on their devices."""
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self.rows, np.asarray(x)), tree)

    def example(self, host: HostBatch) -> Example:
        """A batch on the devices, with the features that it brings or those that the target is asked for here."""
        batch, features, rows_BR = self.place((host.batch, host.features, host.rows_BR))
        if features is None:
            features = jax.device_put(self.target.features(batch), self.rows)
        return Example(batch, features, rows_BR, self.teacher_head_WE)

    def train(
        self, graphdef: nnx.GraphDef, params: nnx.State, frozen: nnx.State, pipeline: Batches, held_out: list[Row]
    ) -> nnx.State:
        """Trains to config.num_steps, from the newest checkpoint if there is one; returns the trained parameters."""
        tx = optimizer(self.config)
        state = jax.jit(lambda params: init_state(params, tx, self.algorithm.num_steps))(params)
        accepted = make_accepted(graphdef, self.evaluation, frozen, self.teacher_head_WE, self.place)
        num_rows = round_up(EVALUATION_ROWS, self.mesh.size)
        evaluate = lambda params: evaluate_teacher_forced(  # noqa: E731
            accepted(params), held_out, self.evaluation, num_rows
        )
        with Checkpoints(self.directory / "checkpoints", every=self.config.checkpoint_every) as checkpoints:
            if checkpoints.latest_step() is not None:
                state = checkpoints.restore(abstract_like(state), self.vocab)
                CONSOLE.print(f"  resuming at step {int(state.step)}")
            with MetricsLog(self.directory / "metrics.jsonl", int(state.step)) as log:
                if int(state.step) == 0:
                    log.evaluation(0, evaluate(state.params))
                state = self._steps(graphdef, state, frozen, make_train_step(graphdef, self.algorithm, tx), pipeline,
                                    evaluate, checkpoints, log)  # fmt: skip
            checkpoints.save(self.config.num_steps, state, self.vocab, force=True)
        return state.params

    def _steps(self, graphdef, state, frozen, train_step, pipeline, evaluate, checkpoints, log) -> TrainState:
        config, start = self.config, int(state.step)
        clock, rows_done, waited = time.monotonic(), 0, 0.0
        examples = one_ahead(batches_from(pipeline, start, config.num_steps, self.prefetch), self.example)
        with bar("train", config.num_steps, start) as progress:
            for step in range(start, config.num_steps):
                asked = time.monotonic()
                host, example = next(examples)
                waited += time.monotonic() - asked
                if step == start:
                    draft = nnx.merge(graphdef, state.params, frozen)
                    CONSOLE.print(f"  {self.algorithm.describe(draft, example)}")
                state, metrics = train_step(state, frozen, example)
                rows_done += int((host.rows_BR < host.batch.tokens_BT.shape[1]).sum())
                done = step + 1
                if done % config.log_every == 0 or done == config.num_steps:
                    metrics = jax.device_get(metrics)  # waits for the steps whose rate is taken
                    seconds = time.monotonic() - clock
                    text = log.training(done, metrics, rows_done / seconds, waited / seconds)
                    progress.advance(done - progress.done, text)
                if done % config.eval_every == 0 or done == config.num_steps:
                    log.evaluation(done, evaluate(state.params))
                if done < config.num_steps:
                    checkpoints.save(done, state, self.vocab)
        return state


class MetricsLog:
    """JSON lines, cut back to the step from which a run goes on."""

    def __init__(self, path: Path, step: int):
        kept = [line for line in read_metrics(path) if line["step"] <= step] if step else []
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def training(self, step: int, metrics: StepMetrics, rows_per_second: float, data_wait: float) -> str:
        """Logs one step and returns the text of the progress line.

        Args:
            data_wait: share of the time so far in which training waited for its data.

        Raises:
            InputError: the loss is not finite.
        """
        if not np.isfinite(metrics.loss):
            raise InputError(
                f"train: the loss is {metrics.loss} at step {step}; lower train.learning_rate, or check the features"
            )
        accuracy = metrics.sums.hit_J / np.maximum(metrics.sums.row_count_J, 1)
        prefix = metrics.sums.prefix_hit_J / np.maximum(metrics.sums.row_count_J, 1)
        self._write({
            "step": step, "kind": "train", "loss": float(metrics.loss), "grad_norm": float(metrics.grad_norm),
            "accuracy": accuracy.tolist(), "mean_over_rows": float(1 + prefix.sum()),
            "rows_per_second": rows_per_second, "data_wait": data_wait,
        })  # fmt: skip
        return (
            f"loss {metrics.loss:.3f}  accuracy {accuracy[0]:.2f}  accept length {1 + prefix.sum():.2f}  "
            f"{rows_per_second:.0f} rows/s  {data_wait:.0%} waiting for data"
        )

    def evaluation(self, step: int, result: TeacherForced) -> None:
        line = {
            "step": step, "kind": "held_out", "loss": result.mean_loss, "accuracy": result.accuracy().tolist(),
            "accept_length": result.accept_length, "mean_over_rows": result.mean_over_rows(),
        }  # fmt: skip
        self._write(line)
        CONSOLE.print(
            f"  step {step}: held-out accept length {line['accept_length']:.3f}, loss {line['loss']:.3f}, "
            f"accuracy {' '.join(f'{a:.2f}' for a in line['accuracy'])}"
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every complete line of a metrics file; a last line cut by a kill is left out.

    Raises:
        InputError: another line is damaged.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    metrics = []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            continue
        try:
            metrics.append(json.loads(line))
            known = metrics[-1]["kind"] in ("train", "held_out") and metrics[-1]["step"] >= 0
        except (ValueError, TypeError, LookupError):
            known = False
        if not known:
            raise InputError(f"{path} line {number}: damaged; delete that line and run again")
    return metrics
