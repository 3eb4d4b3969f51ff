"""What the training command makes of a configuration, as far as it can be seen without computing: for test_wire.py.

Everything runs the command itself, `python -m flaxdraft.train --config run.yaml section.field=value ...`, in a folder
of its own. What takes time has a stand-in of no cost: the target's passes, the optimizer step, the evaluation, decoding
and drawing; a target is loaded once. All else is real, from the YAML to what the stand-ins are called with. Only this
file and the stand-ins' (stand_ins.py) know where things lie in the package.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import threading
import types
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import jax
import numpy as np
import stand_ins
from flax import nnx
from stand_ins import Call, installed, replaced

import flaxdraft.run.run  # noqa: F401 (what it imports is what the command calls)
from flaxdraft import targets
from flaxdraft.config import RunConfig, load_config
from flaxdraft.data import answer_files, answers, pipeline
from flaxdraft.data.documents import Answer
from flaxdraft.decode import decoding
from flaxdraft.errors import InputError
from flaxdraft.evaluate import report, walk
from flaxdraft.files.safetensors_file import load_safetensors
from flaxdraft.plugins import parts_of
from flaxdraft.run.setup import parts
from flaxdraft.targets.decoder import DecoderTarget
from flaxdraft.train import step as step_module
from flaxdraft.train.__main__ import main
from flaxdraft.train.checkpoint import Checkpoints


def algorithms() -> list[str]:
    """The names that `algorithm.name` may have."""
    return [name for name, _ in parts_of("flaxdraft.algorithms")]


class _EnoughError(Exception):
    """What was to be seen is seen."""


@dataclasses.dataclass
class First:
    """What reaches the first optimizer step."""

    weights: dict[str, np.ndarray]  # as they begin, by their paths
    frozen: dict[str, np.ndarray]
    places: dict[str, str]  # where weights and batch lie
    largest_share: float  # of a matrix, that a device holds
    _make: Callable[[], Any]
    _arguments: tuple

    def step(self) -> str:
        """A digest of the lowered step."""
        with jax.set_mesh(self._arguments[2].batch.tokens_BT.sharding.mesh):
            return hashlib.sha256(self._make().lower(*self._arguments).as_text().encode()).hexdigest()

    def teacher_dtypes(self) -> set[str]:
        """Of what the draft learns from."""
        return {str(x.dtype) for x in jax.tree.leaves(self._arguments[2].teacher)}

    def update(self) -> str:
        """The same of all of it but loss and gradients."""
        with replaced(step_module, "summed_gradients", stand_ins.weights_as_gradients):
            return self.step()


def exported(directory: Path) -> dict[str, np.ndarray]:
    """Tensors of an export."""
    return load_safetensors(directory / "model.safetensors")


@dataclasses.dataclass
class Ended:
    """A run of all stages, by its own configuration."""

    config: RunConfig | None
    code: int
    said: str
    complained: str
    saved: list[int]  # steps whose checkpoint was written
    decoded: list[Call]
    evaluated: list[set[int]]  # tokens of the answers of every evaluation
    traced: list[int]  # first and last step of the profiler's trace
    projects: list[str]  # of Weights & Biases
    readers: set[bool]  # whether batches were read in the thread that trains

    def files(self) -> list[Path]:
        return [path for path in Path(self.config.output_dir).rglob("*") if path.is_file()]

    def file(self, name: str) -> Path:
        """The one file or folder of this name in a draft's folder, whose name need not be known."""
        (found,) = [path for path in Path(self.config.output_dir).glob(f"*/{name}") if path.parent.name != "data"]
        return found

    def exported(self) -> dict[str, np.ndarray]:
        return exported(self.file("export"))

    def config_json(self) -> dict[str, Any]:
        return json.loads((self.file("export") / "config.json").read_text())

    def evaluation(self) -> dict[str, Any]:
        return json.loads(self.file("evaluation.json").read_text())["result"]

    def metrics(self, kind: str) -> list[dict[str, Any]]:
        lines = map(json.loads, self.file("metrics.jsonl").read_text().splitlines())
        return [line for line in lines if line["kind"] == kind]

    def checkpoints(self) -> list[int]:
        """Steps whose checkpoint is still there."""
        return sorted(int(path.name) for path in self.file("checkpoints").iterdir() if path.name.isdigit())

    def answers(self, split: str) -> list[list[Answer]]:
        """The rows of each file."""
        paths = sorted((Path(self.config.output_dir) / "data").glob(f"{split}-*.safetensors"))
        return [answer_files.read_rows(path) for path in paths]

    def prompts(self, split: str) -> list[str]:
        texts = json.loads((Path(self.config.output_dir) / "data" / f"{split}.json").read_text())
        return sorted(text["prompt"] for text in texts)


class Command:
    """The training command on one run.yaml. What was seen once is kept."""

    def __init__(self, yaml: Path):
        self.yaml = yaml
        self._numbers = itertools.count()
        self._kept: dict[tuple, Any] = {}

    def config(self, *overrides: str) -> RunConfig:
        return load_config(str(self.yaml), list(overrides))

    def _config_of(self, given: list[str]) -> RunConfig | None:
        """None where the run is refused for its configuration."""
        with contextlib.suppress(InputError):
            return self.config(*given)

    def first(self, *overrides: str) -> First:
        """What reaches the first step."""
        return self._once("first", overrides, self._first)

    def batches(self, *overrides: str) -> str:
        """A digest of the batches of two epochs."""
        return self._once("batches", overrides, self._batches)

    def weights(self, *overrides: str) -> dict[str, bytes]:
        """As they begin."""
        return {path: x.tobytes() for path, x in self.first(*overrides).weights.items()}

    def places(self, *overrides: str) -> dict[str, str]:
        """Where weights and batch lie."""
        return self.first(*overrides).places

    def config_json(self, *overrides: str) -> dict[str, Any]:
        """Of the export."""
        return self.ended(*overrides).config_json()

    def drafter(self, *overrides: str) -> Any:
        """How the draft proposes where it is evaluated."""
        return parts(self.config(*overrides)).evaluation.drafter()

    def step(self, *overrides: str) -> str:
        return self._once("step", overrides, lambda *given: self.first(*given).step())

    def update(self, *overrides: str) -> str:
        return self._once("update", overrides, lambda *given: self.first(*given).update())

    def ended(self, *overrides: str, loss: float = 1.0) -> Ended:
        """All stages to their end."""
        return self._once(("ended", loss), overrides, lambda *given: self._ended(given, loss))

    def joins(self, *overrides: str) -> Mapping[str, Any]:
        """What JAX is told of the processes of the run."""
        with patch("jax.distributed.initialize", side_effect=RuntimeError("enough")) as initialize:
            self._call(overrides)
        return initialize.call_args.kwargs if initialize.called else {}

    def store(self, conversations: Path, out: Path) -> Path:
        """A feature store of conversations, by its own command."""
        from flaxdraft.data.__main__ import main as data_main

        target = self.config().target.path
        with patch.object(DecoderTarget, "features", stand_ins.features), contextlib.redirect_stdout(io.StringIO()):
            assert data_main(["capture", str(conversations), str(out), "--target", target]) == 0
        return out

    def _once(self, what: Any, overrides: tuple[str, ...], see: Callable) -> Any:
        if (what, overrides) not in self._kept:
            self._kept[what, overrides] = see(*overrides)
        return self._kept[what, overrides]

    def _overrides(self, overrides: tuple[str, ...]) -> list[str]:
        """With a folder of the run's own, unless one is given."""
        if any(text.startswith("output_dir=") for text in overrides):
            return list(overrides)
        return [f"output_dir={self.yaml.parent / f'run-{next(self._numbers)}'}", *overrides]

    def _call(self, overrides: tuple[str, ...], evaluated: list[set[int]] | None = None) -> tuple[int, str, str]:
        """Exit code, output and errors; code -1 where a stand-in has ended it."""
        evaluate = functools.partial(stand_ins.evaluated, told=[] if evaluated is None else evaluated)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(err))
            stack.enter_context(patch.object(targets, "load_target", stand_ins.load_once))
            stack.enter_context(replaced(answers, "answer_greedily", stand_ins.answer))
            stack.enter_context(replaced(walk, "make_accepted", lambda *args: lambda params: params))
            stack.enter_context(replaced(walk, "evaluate_teacher_forced", evaluate))
            stack.enter_context(patch.object(DecoderTarget, "features", stand_ins.features))
            try:
                code = main(["--config", str(self.yaml), *self._overrides(overrides)])
            except _EnoughError:
                code = -1
        return code, out.getvalue(), " ".join(err.getvalue().split())

    def _first(self, *overrides: str) -> First:
        make_train_step, seen = step_module.make_train_step, []

        def make(*args, **kwargs):
            def step(state, frozen, example):
                places = {
                    jax.tree_util.keystr(path): str(x.sharding)
                    for path, x in jax.tree_util.tree_leaves_with_path((state.params, example))
                }
                matrices = [x for x in jax.tree.leaves(state.params) if x.ndim > 1]
                share = max(math.prod(x.sharding.shard_shape(x.shape)) / x.size for x in matrices)
                with jax.transfer_guard_device_to_host("allow"):  # the loop forbids reads
                    weights, rest = (_by_path(x) for x in (state.params, frozen))
                again = lambda: make_train_step(*args, **kwargs)  # noqa: E731
                seen.append(First(weights, rest, places, share, again, (state, frozen, example)))
                raise _EnoughError

            return step

        with replaced(step_module, "make_train_step", make):
            code, _, complained = self._call(overrides)
        assert code == -1, complained
        return seen[0]

    def _batches(self, *overrides: str) -> str:
        seen = []

        def batches_from(pipeline, start, stop, prefetch):
            seen.extend(pipeline.batch(step) for step in range(2 * pipeline.steps_per_epoch))
            raise _EnoughError

        with replaced(pipeline, "batches_from", batches_from):
            code, _, complained = self._call(overrides)
        assert code == -1, complained
        digest = hashlib.sha256()
        for x in jax.tree.leaves(seen):
            digest.update(f"{x.dtype}{x.shape}".encode() + x.tobytes())
        return digest.hexdigest()

    def _ended(self, overrides: tuple[str, ...], loss: float) -> Ended:
        given = self._overrides(overrides)
        run = Ended(self._config_of(given), 0, "", "", [], [], [], [], [], set())
        done = []

        def make(graphdef, algorithm, *args):
            step = stand_ins.moving(algorithm, loss)

            def counted(*args):
                done.append(1)
                return step(*args)

            return counted

        save, batch = Checkpoints.save, pipeline.Pipeline.batch

        def spied_save(self, number, *args):
            run.saved.append(number)
            return save(self, number, *args)

        def spied_batch(self, number):
            run.readers.add(threading.current_thread() is threading.main_thread())
            return batch(self, number)

        wandb = types.ModuleType("wandb")
        wandb.__spec__ = ModuleSpec("wandb", None)
        wandb.init = lambda project, **more: run.projects.append(project) or Mock()
        with (
            replaced(step_module, "make_train_step", make),
            replaced(decoding, "Decoding", stand_ins.decoding_of(run.decoded)),
            replaced(report, "write_report", lambda *args: None),
            patch.object(Checkpoints, "save", spied_save),
            patch.object(pipeline.Pipeline, "batch", spied_batch),
            patch("jax.profiler.start_trace", lambda folder: run.traced.append(len(done) + 1)),
            patch("jax.profiler.stop_trace", lambda: run.traced.append(len(done))),
            installed("wandb", wandb),
        ):
            run.code, run.said, run.complained = self._call(tuple(given), run.evaluated)
        return run


def _by_path(state: nnx.State) -> dict[str, np.ndarray]:
    return {"/".join(map(str, path)): np.asarray(x.get_value()) for path, x in nnx.to_flat_state(state)}


# What the tables of test_wire.py say of a run that ended, and of a first step.


def due(every: int, run: Ended) -> list[int]:
    """The multiples of a number of steps, and the last step."""
    last = run.config.train.num_steps
    return sorted({*range(every, last, every), last})


def logged(run: Ended, kind: str) -> list[int]:
    return [line["step"] for line in run.metrics(kind)]


def best(run: Ended) -> int:
    """The first evaluation after the beginning: the stand-in's score stays what it is."""
    return logged(run, "held_out")[1]


def kept(run: Ended, latest: int, every: int | None) -> bool:
    stay = {step for step in run.saved if every is not None and step % every == 0}
    return run.checkpoints() == sorted({*run.saved[-latest:], *stay, best(run)})


def chosen(run: Ended) -> int:
    """The step whose checkpoint was evaluated and exported."""
    return run.evaluation()["checkpoint"]["step"]


def moved(run: Ended, each: float) -> bool:
    """Whether the exported weights are so far from where they began, every step."""
    return bool((run.exported()["midlayer.hidden_norm.weight"] == 1 + each * chosen(run)).all())


def lengths(run: Ended, split: str) -> set[int]:
    """Tokens of the answers."""
    return {row.num_answer for rows in run.answers(split) for row in rows}


def prompts_of(path: str) -> set[str]:
    return {row["prompt"] for row in map(json.loads, Path(path).read_text().splitlines())}


def begins_with(first: First, directory: str) -> bool:
    return np.array_equal(first.weights["lm_head/kernel"].T, exported(Path(directory))["lm_head.weight"])
