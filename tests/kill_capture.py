"""python kill_capture.py FOLDER KILLS SEED: captures that are killed at random points, each finished by another run.

Every capture is a process of its own; one process that has imported everything forks them. Every other one gets SIGKILL
after a random time, the rest die in the middle of writing a file, behind a random number of bytes. What they leave must
be made whole by a restart, byte by byte what an uninterrupted capture writes.
"""

import os
import random
import resource
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np

from flaxdraft.data.store import MANIFEST, Source
from flaxdraft.data.store_capture import capture
from flaxdraft.data.store_writer import make_plan
from flaxdraft.data.templates import Rendered
from flaxdraft.interfaces import Features

E, V, ROWS = 128, 500, 96
SOURCE = Source("target", "tokenizer", "data", "float32", (1, 3, 5), E, V, "bfloat16", "bfloat16")


class Instant:
    """A target whose features are arithmetic on its tokens."""

    row_multiple = 1

    def features(self, batch):
        wide = batch.tokens_BT[..., None] * np.linspace(0.1, 1, E, dtype=np.float32)
        taps = np.sin(wide[:, :, None] * np.array([1, 2, 3], np.float32)[:, None])
        return Features(taps, np.cos(wide), batch.tokens_BT % V, wide.sum(-1))

    def embedding(self):
        return np.ones((V, E), np.float32)

    def final_norm(self):
        return np.ones(E, np.float32)


def run(directory: Path) -> bool:
    rng = np.random.default_rng(0)
    rows = [Rendered(rng.integers(0, V, n).astype(np.int32), np.arange(n) > 5) for n in rng.integers(20, 90, ROWS)]
    plan = make_plan(SOURCE, [len(row.tokens) for row in rows], 300, tied=True)
    return capture(directory, plan, rows, Instant(), batch_tokens=200, part=(0, 1))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def main(root: Path, kills: int, seed: int) -> None:
    warnings.simplefilter("ignore")  # JAX warns of forking; no array of its own has been made here
    rng = random.Random(seed)
    began = time.monotonic()
    assert run(root / "whole")
    took, want = time.monotonic() - began, contents(root / "whole")
    early = 0
    largest = max(map(len, want.values()))
    for number in range(kills):
        directory, in_a_file = root / "killed", number % 2 == 0
        num_bytes = rng.randrange(1, largest)
        child = os.fork()
        if child == 0:
            if in_a_file:
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python would make an error of it
                resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
            run(directory)
            os._exit(0)
        if not in_a_file:
            time.sleep(rng.uniform(0.05, 1) * took)
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        early += directory.exists() and not (directory / MANIFEST).exists()
        assert run(directory)
        assert contents(directory) == want
        shutil.rmtree(directory)
    print(f"{early} of {kills} were stopped before their end, {len(want)} files are the same")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
