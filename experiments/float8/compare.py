"""Two runs of the same data side by side, from their metrics: loss over steps and held-out accept length.

    python -m flaxdraft.train --config experiments/quickstart.yaml train.num_steps=600 train.compute_dtype=bfloat16 \
        train.log_every=1 output_dir=runs/float8 name=bfloat16
    python -m flaxdraft.train --config experiments/quickstart.yaml train.num_steps=600 train.compute_dtype=bfloat16 \
        train.log_every=1 output_dir=runs/float8 name=float8 train.float8=true
    python experiments/float8/compare.py runs/float8/bfloat16 runs/float8/float8 --out experiments/float8
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from flaxdraft.train.metrics_log import read_metrics

WINDOW = 20  # steps whose mean is drawn


def curve(directory: Path, kind: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one figure."""
    lines = [line for line in read_metrics(directory / "metrics.jsonl") if line["kind"] == kind]
    if not lines:
        raise SystemExit(f"{directory}: its metrics.jsonl holds no {kind} figures; train it first")
    return np.array([line["step"] for line in lines]), np.array([line[name] for line in lines])


def smooth(values: np.ndarray) -> np.ndarray:
    """Means over the last WINDOW values, from the first whole window on."""
    return np.convolve(values, np.full(WINDOW, 1 / WINDOW), mode="valid")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="folder for curve.png")
    arguments = parser.parse_args()
    figure, (loss_axes, length_axes) = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
    print(f"| run | steps | loss, mean of the last {5 * WINDOW} | held-out loss | held-out accept length |")
    print("|---|---|---|---|---|")
    for directory in arguments.runs:
        steps, losses = curve(directory, "train", "loss")
        at, lengths = curve(directory, "held_out", "accept_length")
        _, held_out = curve(directory, "held_out", "loss")
        loss_axes.plot(steps[WINDOW - 1 :], smooth(losses), label=directory.name)
        length_axes.plot(at, lengths, "o-", label=directory.name)
        print(f"| {directory.name} | {steps[-1]} | {losses[-5 * WINDOW :].mean():.4f} | {held_out[-1]:.4f} | "
              f"{lengths[-1]:.4f} |")  # fmt: skip
    loss_axes.set(xlabel="optimizer step", ylabel="loss, nats a row", title=f"Loss, means of {WINDOW} steps")
    length_axes.set(xlabel="optimizer step", ylabel="tokens a pass", title="Held-out accept length")
    for axes in (loss_axes, length_axes):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(arguments.out / "curve.png", dpi=130)


if __name__ == "__main__":
    main()
