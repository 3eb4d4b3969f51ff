"""Rows a minute through the training pipeline, from a feature store on disk, and the memory that takes.

    python experiments/bench_data.py

Writes a store of random features (2 GB, the quickstart's width of 576, bfloat16, documents of 64 to 512 tokens) into a
temporary folder, then reads packed rows of 512 tokens, and rows in two buckets, for some epochs, as a trainer does:
batches of 16, read ahead by threads. Nothing is computed on them. The files have just been written, so they come out
of the system's cache: what is measured is this code, not a disk. "Of cores" is processor time; "peak" what the process
takes beyond what it had before the first batch; "held" are prefetch + 2 batches: those read ahead, the one handed out
next, and the caller's.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from flaxdraft.algorithms.eagle3.algorithm import Algorithm
from flaxdraft.algorithms.eagle3.settings import Settings
from flaxdraft.config import DataConfig, TrainConfig
from flaxdraft.data.documents import Document
from flaxdraft.data.pipeline import batches_from, make_pipeline
from flaxdraft.data.store import TARGET, FeatureStore, Source, finish, write_shard
from flaxdraft.files.safetensors_file import save_safetensors
from flaxdraft.interfaces import Features

WIDTH, VOCAB, LENGTH, SHARD_ROWS = 576, 49152, 512, 48
SOURCE = Source("bench", "bench", "bench", "bfloat16", (1, 14, 26), WIDTH, VOCAB, "bfloat16", "bfloat16")


def write(directory: Path, gigabytes: float) -> None:
    rng = np.random.default_rng(0)
    written, index = 0, 0
    while written < gigabytes * 1e9:
        rows = [_document(rng, int(n)) for n in rng.integers(64, LENGTH + 1, SHARD_ROWS)]
        write_shard(directory, index, rows, SOURCE)
        written += sum(len(row.tokens) for row in rows) * (4 * WIDTH * 2 + 13)
        index += 1
    weights = {"embedding": np.ones((VOCAB, WIDTH), np.float32), "final_norm": np.ones(WIDTH, np.float32)}
    save_safetensors(directory / TARGET, weights)
    finish(directory, SOURCE, index)


def _document(rng: np.random.Generator, num: int) -> Document:
    noise = rng.integers(0x3C00, 0x4000, (num, 4, WIDTH), np.uint16).view(ml_dtypes.bfloat16)
    features = Features(
        noise[:, :3], noise[:, 3], rng.integers(0, VOCAB, num, np.int32), rng.random(num, np.float32)
    )  # fmt: skip
    return Document(rng.integers(0, VOCAB, num, np.int32), np.arange(num) >= num // 4, features)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(directory: Path, pack_length: int | None, batch_size: int, prefetch: int, epochs: int) -> str:
    train = TrainConfig(num_steps=1, batch_size=batch_size, pack_length=pack_length)
    pipeline = make_pipeline(FeatureStore(directory), Algorithm(Settings()), train, DataConfig(prompts="none"), seed=0)
    steps, before = epochs * pipeline.steps_per_epoch, peak_bytes()
    rows, tokens, began, worked = 0, 0, time.monotonic(), time.process_time()
    for host in batches_from(pipeline, 0, steps, prefetch):
        rows += int((host.batch.segments_BT.max(axis=1) > 0).sum())
        tokens += int((host.batch.segments_BT > 0).sum())
    seconds, worked = time.monotonic() - began, time.process_time() - worked
    taken, held = peak_bytes() - before, (prefetch + 2) * batch_size * LENGTH * (4 * WIDTH * 2 + 13 + 9)
    return (
        f"| {'packed' if pack_length else 'two buckets'} | {prefetch} | {rows} | {seconds:.1f} s | {worked:.1f} s | "
        f"{60 * rows / seconds:,.0f} | {60 * tokens / LENGTH / seconds:,.0f} | {taken / 1e6:.0f} MB | "
        f"{held / 1e6:.0f} MB |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pack", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--prefetch", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        write(arguments.write, arguments.gigabytes)
    elif arguments.read:
        a = arguments
        print(measure(a.read, a.pack, a.batch, a.prefetch, a.epochs), flush=True)
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Each line by a process of its own, so that its peak is its own."""
    with tempfile.TemporaryDirectory() as folder:

        def call(*more: str) -> None:
            subprocess.run([sys.executable, __file__, *more], check=True)

        call("--write", folder, "--gigabytes", str(arguments.gigabytes))
        size, store = sum(path.stat().st_size for path in Path(folder).iterdir()), FeatureStore(folder)
        print(f"{len(store)} documents, {store.lengths.sum()} tokens, {size / 1e9:.2f} GB, {os.cpu_count()} cores\n")
        columns = "rows, prefetch, rows read, time, of cores, rows a minute, full rows of 512 a minute, peak, held"
        print(f"| {columns.replace(', ', ' | ')} |\n|{'---|' * 9}", flush=True)
        common = ("--read", folder, "--batch", str(arguments.batch), "--epochs", str(arguments.epochs))
        for prefetch in ("2", "4", "8"):
            call(*common, "--prefetch", prefetch, "--pack", str(LENGTH))
        call(*common, "--prefetch", "4")


if __name__ == "__main__":
    main()
