"""What a target of real size costs: whole commands of flaxdraft around a random target (make_target.py), timed.

    python experiments/real_target/run.py llama-8b --workdir /tmp/real --cases load train regenerate
    python experiments/real_target/run.py llama-8b --workdir /tmp/real --cases train --mesh fsdp=2
    python experiments/real_target/run.py tiny --workdir /tmp/real --cases load train regenerate     # CPU, a minute

Each case runs in a process of its own, so that its peak memory is its own, and prints one line of JSON; all lines are
added to WORKDIR/results.jsonl, and `--write` makes results.md of them. Nothing is downloaded.

load        seconds from the call to weights on the devices
train       online training (`data.conversations`): steady tokens/s, the share of time that waits for data, peak memory
regenerate  answers written per second
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from make_target import SHAPES, make

HERE = Path(__file__).parent
ROWS, LENGTH = 4, 2048  # of a device's batch
NUM_STEPS, LOG_EVERY = 40, 10  # the first ten steps compile
NUM_ANSWERS, ANSWER_TOKENS = 512, 256
SMALL = {"tiny": (64, 8, 16)}  # length, answers, their tokens: on a CPU


def sizes(shape: str) -> tuple[int, int, int]:
    return SMALL.get(shape, (LENGTH, NUM_ANSWERS, ANSWER_TOKENS))


def write_conversations(path: Path, count: int, length: int) -> None:
    """One question and one answer each, of random letters, together as many tokens as a row holds."""
    rng = np.random.default_rng(1)
    with path.open("w") as file:
        for i in range(count):
            question, answer = ("".join(map(chr, rng.integers(97, 123, size))) for size in (length // 8, length))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"id": str(i), "messages": messages}) + "\n")


def write_prompts(path: Path) -> None:
    rng = np.random.default_rng(2)
    with path.open("w") as file:
        for i in range(8):
            text = "".join(map(chr, rng.integers(97, 123, 40)))
            file.write(json.dumps({"id": str(i), "category": "noise", "split": "held_out", "prompt": text}) + "\n")


def peak_gigabytes() -> list[float]:
    """Of each device, since the process began; empty where devices do not count."""
    import jax

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return [round(one["peak_bytes_in_use"] / 1e9, 2) for one in stats if "peak_bytes_in_use" in one]


def load(target: Path, shape: str, workdir: Path, axes: dict[str, int]) -> dict[str, Any]:
    import jax

    from flaxdraft import targets
    from flaxdraft.devices.mesh import make_mesh
    from flaxdraft.nn.precision import of_both

    start = time.perf_counter()
    mesh = make_mesh(**axes) if axes else None
    loaded = targets.from_pretrained(str(target), precision=of_both("bfloat16"), mesh=mesh)
    jax.block_until_ready(jax.tree.leaves(loaded.model))
    seconds = time.perf_counter() - start
    total = sum(x.nbytes for x in jax.tree.leaves(loaded.model))
    return {"seconds": round(seconds, 1), "GB": round(total / 1e9, 2), "GB/s": round(total / 1e9 / seconds, 2)}


def train(target: Path, shape: str, workdir: Path, axes: dict[str, int]) -> dict[str, Any]:
    from flaxdraft.train.__main__ import main

    length, _, _ = sizes(shape)
    rows = ROWS * axes.get("data", 1) * axes.get("fsdp", 1)
    write_conversations(workdir / "conversations.jsonl", rows * 16, length)
    write_prompts(workdir / "prompts.jsonl")
    config = {
        "output_dir": str(workdir / f"out-{int(time.time())}"),
        "target": {"path": str(target)},
        "data": {
            "prompts": str(workdir / "prompts.jsonl"), "conversations": str(workdir / "conversations.jsonl"),
            "max_length": length, "rows": 8,
        },
        "draft": {"draft_vocab_size": min(32000, SHAPES[shape]["vocab_size"] // 2)},
        "algorithm": {"ttt_length": 7},
        "train": {
            "num_steps": NUM_STEPS, "batch_size": rows, "learning_rate": 1e-4, "log_every": LOG_EVERY,
            "eval_every": NUM_STEPS, "checkpoint_every": NUM_STEPS, "length_buckets": 1,
        },
        "evaluate": {"max_new_tokens": 16, "chain_length": 3},
        "mesh": axes,
    }  # fmt: skip
    (workdir / "run.yaml").write_text(yaml.safe_dump(config))
    start = time.perf_counter()
    if code := main(["--config", str(workdir / "run.yaml")]):
        raise SystemExit(f"the command ended with {code}")
    (metrics,) = Path(config["output_dir"]).glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steady = [line for line in lines if line["kind"] == "train" and line["step"] > LOG_EVERY]
    return {
        "tokens/s": round(float(np.median([line["tokens_per_second"] for line in steady]))),
        "data wait": round(float(np.median([line["data_wait"] for line in steady])), 4),
        "whole command, seconds": round(time.perf_counter() - start),
    }


def regenerate(target: Path, shape: str, workdir: Path, axes: dict[str, int]) -> dict[str, Any]:
    from flaxdraft.data.__main__ import main

    length, answers, tokens = sizes(shape)
    write_conversations(workdir / "questions.jsonl", answers, length // 8)
    out = workdir / f"answers-{int(time.time())}"
    mesh = ["--mesh", ",".join(f"{axis}={size}" for axis, size in axes.items())] if axes else []
    command = [
        "regenerate", str(workdir / "questions.jsonl"), str(out), "--target", str(target), *mesh,
        "--max-new-tokens", str(tokens), "--rows", str(min(256, answers)),
    ]  # fmt: skip
    start = time.perf_counter()
    if code := main(command):
        raise SystemExit(f"the command ended with {code}")
    seconds = time.perf_counter() - start
    lines = (out / "conversations.jsonl").read_text().splitlines()
    made = sum(sum(json.loads(line)["loss_mask"]) for line in lines)
    return {"answer tokens": made, "whole command, seconds": round(seconds), "tokens/s": round(made / seconds)}


CASES = {"load": load, "train": train, "regenerate": regenerate}


def run_one(case: str, shape: str, workdir: Path, axes: dict[str, int]) -> None:
    """In this process; the last line of its output is the result."""
    import jax

    found = CASES[case](workdir / shape, shape, workdir, axes)
    device = jax.devices()[0].device_kind
    about = {"case": case, "shape": shape, "mesh": axes, "device": device, "jax": jax.__version__}
    print(json.dumps(about | found | {"peak GB": peak_gigabytes()}), flush=True)


def axes_of(text: str) -> dict[str, int]:
    return {axis: int(size) for axis, size in (part.split("=") for part in text.split(",") if part)}


def write_results(workdir: Path) -> None:
    """results.md beside this script: one row a line, cases apart."""
    lines = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    text = ["# Targets of real size", "", "Written by `run.py`; every row is one process:",
            "`python experiments/real_target/run.py SHAPE --workdir DIR --cases CASE --mesh MESH`.", ""]  # fmt: skip
    for case in CASES:
        rows = [line for line in lines if line["case"] == case]
        if not rows:
            continue
        columns = [name for name in rows[0] if name != "case"]
        text += [f"## {case}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        text += ["| " + " | ".join(str(row.get(name, "")) for name in columns) + " |" for row in rows] + [""]
    notes = HERE / "notes.md"  # by hand, what the numbers do not say
    text += [notes.read_text().rstrip(), ""] if notes.exists() else []
    (HERE / "results.md").write_text("\n".join(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=sorted(CASES))
    parser.add_argument("--mesh", default="", help="fsdp=2,tensor=2")
    parser.add_argument("--here", action="store_true", help="run the one case in this process")
    parser.add_argument("--write", action="store_true", help="write results.md")
    given = parser.parse_args()
    given.workdir.mkdir(parents=True, exist_ok=True)
    if given.here:
        run_one(given.cases[0], given.shape, given.workdir, axes_of(given.mesh))
        return
    start = time.perf_counter()
    total = make(given.shape, given.workdir / given.shape)
    print(f"{total / 1e9:.1f} GB of weights, {time.perf_counter() - start:.0f} s", flush=True)
    for case in given.cases:
        command = [
            sys.executable, __file__, given.shape, "--workdir", str(given.workdir), "--cases", case, "--mesh",
            given.mesh, "--here",
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        print(done.stdout[-3000:], flush=True)
        if done.returncode:
            raise SystemExit(f"{case} ended with {done.returncode}")
        with (given.workdir / "results.jsonl").open("a") as file:
            file.write(done.stdout.splitlines()[-1] + "\n")
    if given.write:
        write_results(given.workdir)


if __name__ == "__main__":
    main()
