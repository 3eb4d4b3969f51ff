"""Starts the processes of a small run (worker.py) and looks after them."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import yaml
from closeness import assert_close
from compiling import FAST

WORKER = Path(__file__).with_name("worker.py")
TRAIN = {
    "num_steps": 12, "batch_size": 8, "learning_rate": 2e-3, "compute_dtype": "float32", "log_every": 1,
    "eval_every": 4, "checkpoint_every": 3, "length_buckets": 1,
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


class SmallRuns:
    """A folder with a configuration; runs of it differ in overrides and in how many processes share their devices."""

    def __init__(self, root: Path):
        self.root = root
        prompts = [{"id": s, "category": "x", "split": s, "prompt": "x"} for s in ("train", "held_out")]
        (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
        (root / "target").write_text("made up by the worker")
        config = {
            "output_dir": str(root / "out"), "target": {"path": str(root / "target")},
            "data": {"prompts": str(root / "prompts.jsonl")}, "draft": {"draft_vocab_size": 24},
            "algorithm": {"ttt_length": 2}, "train": TRAIN, "evaluate": {"chain_length": 1},
            "mesh": {"data": 4},
        }  # fmt: skip
        (root / "run.yaml").write_text(yaml.safe_dump(config))

    def start(self, name: str, num_processes: int, *overrides: str, devices: int = 4, **environment: str):
        """The processes of one run over `devices` devices in all."""
        port, processes = free_port(), []
        for index in range(num_processes):
            own = os.environ | {
                "JAX_NUM_CPU_DEVICES": str(devices // num_processes), "JAX_PLATFORMS": "cpu",
                "PYTHONWARNINGS": "ignore", **FAST, **environment,
            }  # fmt: skip
            if num_processes > 1:
                own |= {
                    "FLAXDRAFT_COORDINATOR": f"localhost:{port}", "FLAXDRAFT_NUM_PROCESSES": str(num_processes),
                    "FLAXDRAFT_PROCESS_ID": str(index),
                }  # fmt: skip
            command = [
                sys.executable, str(WORKER), str(self.root / "run.yaml"), str(self.result(name, index)),
                f"output_dir={self.root / name}", f"mesh.data={devices}", *overrides,
            ]  # fmt: skip
            output = self.output(name, index).open("ab")
            processes.append(subprocess.Popen(command, env=own, stdout=output, stderr=output))
            output.close()
        return processes

    def run(self, name: str, num_processes: int, *overrides: str, **options) -> list[int]:
        """Exit codes once all processes have ended."""
        return finish(self.start(name, num_processes, *overrides, **options))

    def draft(self, name: str) -> Path:
        return self.root / name / "llama"

    def result(self, name: str, index: int = 0) -> Path:
        return self.root / f"{name}.result-{index}.json"

    def output(self, name: str, index: int = 0) -> Path:
        return self.root / f"{name}.output-{index}.txt"

    def said(self, name: str, index: int = 0) -> str:
        """All that a process has printed, over all of its lives."""
        return self.output(name, index).read_text()

    def digest(self, name: str, index: int = 0) -> str:
        return json.loads(self.result(name, index).read_text())["digest"]

    def weights(self, name: str, index: int = 0) -> list[float]:
        """The sum of magnitudes of every parameter at the end."""
        return json.loads(self.result(name, index).read_text())["params"]

    def lines(self, name: str, kind: str = "train") -> list[dict]:
        text = (self.draft(name) / "metrics.jsonl").read_text()
        return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]

    def losses(self, name: str) -> list[float]:
        return [line["loss"] for line in self.lines(name)]

    def checkpoints(self, name: str) -> list[int]:
        folder = self.draft(name) / "checkpoints"
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []

    def copy_until(self, name: str, copy: str, step: int) -> None:
        """A run as it was when it had saved that step."""
        folder = shutil.copytree(self.draft(name), self.draft(copy), symlinks=True)
        for later in self.checkpoints(copy):
            if later > step:
                shutil.rmtree(folder / "checkpoints" / str(later))
        assert self.checkpoints(copy)[-1] == step

    def assert_agree(self, name: str, like: str) -> None:
        """The same steps and the same tokens; losses and held-out figures to rounding."""
        for kind in ("train", "held_out"):
            want, got = (self.lines(run, kind) for run in (like, name))
            for counted in ("step", "tokens"):
                assert [line.get(counted) for line in got] == [line.get(counted) for line in want]
            losses = ([line["loss"] for line in lines] for lines in (got, want))
            assert_close(*losses, ulp=80, dtype=np.float32)

    def assert_identical(self, name: str, like: str) -> None:
        """Every logged loss and gradient norm, every held-out figure and the weights at the end, to the bit."""
        trained, held_out = ("step", "loss", "grad_norm", "tokens"), ("step", "loss", "accuracy")
        for kind, fields in (("train", trained), ("held_out", held_out)):
            want, got = ([[line[field] for field in fields] for line in self.lines(run, kind)] for run in (like, name))
            assert got == want
        assert self.digest(name) == self.digest(like)

    def wait_for_step(self, name: str, step: int, processes) -> None:
        """Returns once that many steps are logged."""
        path = self.draft(name) / "metrics.jsonl"
        while not path.exists() or f'"step": {step}, "kind": "train"' not in path.read_text():
            codes = [process.poll() for process in processes]
            assert codes == [None] * len(codes), f"ended too early: {codes}\n{self.said(name)[-3000:]}"
            time.sleep(0.02)


def finish(processes, timeout: float = 500.0) -> list[int]:
    """Exit codes; whatever is left after the timeout is killed."""
    end = time.monotonic() + timeout
    try:
        return [process.wait(max(end - time.monotonic(), 0.1)) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
